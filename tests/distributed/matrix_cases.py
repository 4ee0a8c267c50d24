"""What the matrix of tests runs on every rank: one case, in every way."""

from contextlib import nullcontext
from copy import deepcopy
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from sirfshampoo import SIRFShampoo, recipe
from tests.cases import FAST
from tests.distributed.as_nccl import AsNccl
from tests.distributed.distributed_cases import JOIN, STEPS, whole

WAYS = ("ddp", "fsdp", "hsdp", "tp", "sp", "tp and fsdp", "sp and fsdp")
"""`tp` is tensor parallelism, `sp` the same with sequence parallelism within."""

SETTINGS = ("plain", "recipe")

EXAMPLES = 13
"""Of a batch; no number of ranks divides it."""


class Narrow(nn.Module):
    """Layers for tensor and for sequence parallelism."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)
        self.wide = nn.Linear(6, 12)
        self.narrow = nn.Linear(12, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Read sequences ``[batch, 12, 6]``."""
        x = self.narrow(self.wide(self.norm(self.enter(x))).tanh())
        return 1.0 * self.last(x)  # FSDP2 warns of a view


def parts(size: int, number: int) -> list[slice]:
    """Return unequal parts of a batch: the first has the most."""
    cuts = [size - size * (number - i) ** 2 // number**2 for i in range(number + 1)]
    return [slice(a, b) for a, b in pairwise(cuts)]


def parallel(model: nn.Module, way: str) -> tuple[nn.Module, slice, int]:
    """Make a model one of many ranks.

    Returns:
        The model, which examples it sees, and over how many parts of them gradients
        are averaged.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    if way == "ddp":
        return DistributedDataParallel(model), parts(EXAMPLES, world)[rank], world
    if way in ("fsdp", "hsdp"):
        two_axes = {2: (1, 2), 3: (3, 1), 4: (2, 2)}
        shape = (world,) if way == "fsdp" else two_axes[world]
        names = ("replicate", "shard")[-len(shape) :]
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
        return fully_shard(model, mesh=mesh), parts(EXAMPLES, world)[rank], world
    data = 2 if "fsdp" in way and world == 4 else 1
    shape = (data, world // data)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    within = Shard(1) if "sp" in way else Replicate()
    plan: dict[str, Any] = {
        "enter": RowwiseParallel(input_layouts=Replicate(), output_layouts=within),
        "wide": ColwiseParallel(input_layouts=within),
        "narrow": RowwiseParallel(),
        **({"norm": SequenceParallel()} if "sp" in way else {}),
    }
    parallelize_module(model, mesh["tensor"], plan)
    if "fsdp" not in way:
        return model, slice(None), 1
    own = parts(EXAMPLES, data)[mesh.get_local_rank("data")]
    return fully_shard(model, mesh=mesh["data"]), own, data


def equals_one_process(way: str, settings: str, owned: bool) -> float:
    """Train together and alone; return the largest difference.

    In the middle, save and load.
    """
    torch.manual_seed(1)
    model = Narrow().double()
    options: dict[str, Any] = {
        **FAST,
        "T": 2,
        "kappa": 0.01,
        "combine_params": JOIN,
        "structures": {1: "diagonal", 2: "dense"},
    }
    if settings == "recipe":
        options = recipe(model, batch_size=EXAMPLES, steps=100)
    expected, start = deepcopy(model), deepcopy(model)
    twin = SIRFShampoo(expected, **options, process_group=False)
    model, own, averaged = parallel(model, way)
    if settings == "recipe":  # it says the same of what is distributed by now
        options = recipe(model, batch_size=EXAMPLES, steps=100)
    optimizer = SIRFShampoo(model, **options, shard_preconditioners=owned)
    checker, beside = AsNccl(), AsNccl(in_step=False)
    draw = torch.Generator().manual_seed(2)
    for step in range(STEPS):
        if step == STEPS // 2:
            with beside:
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.diagnostics()
        x = torch.randn(EXAMPLES, 12, 6, generator=draw, dtype=torch.float64)
        for net, made, part, weight in (
            (expected, twin, slice(None), 1),
            (model, optimizer, own, averaged),
        ):
            made.zero_grad()
            out = net(x[part])
            (weight * (out - 1).square().sum() / (EXAMPLES * 12 * 2)).backward()
            with checker if made is optimizer else nullcontext():
                made.step()
            assert made.batch_size == EXAMPLES
    checker.compare()
    beside.compare()
    largest = 0.0
    for p, q, r in zip(
        *(net.parameters() for net in (model, expected, start)), strict=True
    ):
        found = whole(p)
        assert (q - r).abs().max() > 1e-3
        largest = max(largest, (found - q).abs().max().item())
        of_first = found.clone()
        dist.broadcast(of_first, 0)
        assert torch.equal(found, of_first)
    return largest
