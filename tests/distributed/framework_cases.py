"""What the tests of frameworks run on every rank, see `distributed_cases`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from sirfshampoo import SIRFShampoo
from tests.distributed.distributed_cases import (
    ROWS,
    STEPS,
    alone,
    assert_equal_parameters,
    batches,
    make_model,
    maker,
    mean_loss,
    share,
)


@contextmanager
def accelerator(way: str) -> Iterator[Any]:
    """Yield an accelerator of accelerate; on CPUs it has to be talked into FSDP."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(dist.get_rank())
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(dist.get_world_size())
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    found = Accelerator(cpu=True)
    if way != "ddp":
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", state_dict_type=way
        )
    yield found
    AcceleratorState._reset_state(True)


def accelerated(
    found: Any, options: str, owned: bool, folder: str, load: bool = False
) -> tuple[nn.Module, SIRFShampoo]:
    """Train by accelerate from the start, or from the middle; save there."""
    model = make_model()
    optimizer = maker(options)(model, shard_preconditioners=owned)
    model, optimizer = found.prepare(model, optimizer)
    if load:
        found.load_state(folder)
    for step, (x, y) in enumerate(batches()):
        if step == STEPS // 2 and not load:
            found.save_state(folder)
        if step >= STEPS // 2 or not load:
            optimizer.zero_grad()
            found.backward(mean_loss(model, share(x), share(y), dist.get_world_size()))
            optimizer.step()
            assert optimizer.optimizer.batch_size == ROWS
    return model, optimizer.optimizer


def accelerate(way: str, options: str, owned: bool, folder: str) -> None:
    """The optimizer is built before accelerate puts shards in the parameters' place."""
    expected = make_model()
    twin = alone(expected, maker(options))
    for load in (False, True):
        with accelerator(way) as found:
            model, optimizer = accelerated(found, options, owned, folder, load)
        assert_equal_parameters(model, expected)
        assert optimizer.global_step == STEPS
        assert len(optimizer.state) == len(twin.state)
