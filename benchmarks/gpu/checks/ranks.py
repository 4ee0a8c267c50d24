"""Whether a process group of one rank changes nothing, with each backend."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.checks.common import BATCH, FAST, Check, equal
from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo

SECONDS = 30  # until a collective is given up
WAYS = ("plain", "DDP", "FSDP2")


@contextmanager
def group(backend: str) -> Iterator[None]:
    """Be the only rank."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            backend,
            init_method=f"file://{Path(folder) / 'store'}",
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=SECONDS),
        )
        try:
            yield
        finally:
            dist.destroy_process_group()


def net(device: str) -> nn.Module:
    """Return layers of odd sizes, equal ones among them."""
    torch.manual_seed(0)
    layers = [nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 3)]
    return nn.Sequential(*layers).to(device)


def options(owned: bool) -> dict:
    """Return the optimizer's arguments; examples are counted."""
    rules = (LinearWeightBias(), PerParameter())
    known = {k: v for k, v in FAST.items() if k != "batch_size"}
    known |= {"T": 2, "combine_params": rules}
    return known | {"shard_preconditioners": owned}


def train(model: nn.Module, optimizer: SIRFShampoo, device: str, steps: range) -> None:
    """Take steps on gradients of a net."""
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 7, generator=draw).to(device)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert optimizer.batch_size == BATCH


def whole(p: Tensor) -> Tensor:
    """Return a parameter whole, on the CPU."""
    p = p.detach()
    p = p.full_tensor() if hasattr(p, "full_tensor") else p
    return p.double().cpu().flatten()


def one_rank(device: str, backend: str, way: str, owned: bool) -> str:
    """Train with a group of one rank, save, load, go on; compare with none."""
    expected = net(device)
    model = deepcopy(expected)
    with group(backend):
        if way == "DDP":
            model = DistributedDataParallel(model)
        elif way == "FSDP2":
            model = fully_shard(model, mesh=init_device_mesh(device, (1,)))
        optimizer = SIRFShampoo(model, **options(owned))
        train(model, optimizer, device, range(3))
        optimizer.load_state_dict(optimizer.state_dict())
        train(model, optimizer, device, range(3, 6))
        optimizer.diagnostics()
        found = torch.cat([whole(p) for p in model.parameters()])
    alone = SIRFShampoo(expected, **options(owned=False))
    train(expected, alone, device, range(6))
    return equal(
        found, torch.cat([whole(p) for p in expected.parameters()]), tolerance=1e-5
    )


def checks(device: str, tiny: bool) -> list[Check]:
    """Return the checks."""
    backends = ("gloo",) if device == "cpu" else ("cpu:gloo,cuda:nccl", "nccl")
    return [
        Check(
            f"{backend}, {way}{', sharded pre-conditioners' if owned else ''}",
            partial(one_rank, device, backend, way, owned),
        )
        for backend in backends
        for way in WAYS
        for owned in (False, True)
    ]
