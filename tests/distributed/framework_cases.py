"""What the tests of frameworks run on every rank, see `distributed_cases`."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

from sirfshampoo import SIRFShampoo
from tests.distributed.distributed_cases import (
    ROWS,
    STEPS,
    Words,
    alone,
    assert_equal_parameters,
    batches,
    make_model,
    maker,
    mean_loss,
    share,
    whole,
)


@contextmanager
def accelerator(way: str) -> Iterator[Any]:
    """Yield an accelerator of accelerate; on CPUs it has to be talked into FSDP."""
    from accelerate import Accelerator

    set_environment()
    found = Accelerator(cpu=True)
    shard_by(found, way)
    yield found
    forget_accelerators()


def set_environment() -> None:
    """Say what torchrun says."""
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(dist.get_rank())
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(dist.get_world_size())
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate warns without


def shard_by(found: Any, way: str) -> None:
    """Talk accelerate into FSDP2 on CPUs; `way` is a type of state dicts, or DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if way != "ddp":
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="NO_WRAP", state_dict_type=way
        )


def forget_accelerators() -> None:
    """Let the next accelerator be another."""
    from accelerate.state import AcceleratorState

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


class WithLoss(Words):
    """A model as transformers' Trainer takes it."""

    def forward(self, words: Tensor, targets: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """Return the mean loss."""
        return {"loss": (super().forward(words) - targets).square().mean()}


class Examples(Dataset[dict[str, Tensor]]):
    """Examples as the Trainer takes them."""

    def __len__(self) -> int:
        """Return how many there are: for ten steps of four."""
        return 40

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        """Return one."""
        draw = torch.Generator().manual_seed(i)
        words = torch.randint(9, (3,), generator=draw)
        targets = torch.randn(3, generator=draw, dtype=torch.float64)
        return {"words": words, "targets": 1 + targets}


def train_by_trainer(
    way: str, options: str, owned: bool, folder: str, resume: bool
) -> tuple[list[Tensor], list[int]]:
    """Train by transformers' Trainer, with four examples in a step of all ranks.

    Returns:
        The parameters, and how many examples were counted in each step.
    """
    from transformers import Trainer, TrainingArguments

    set_environment()
    torch.manual_seed(1)
    model = WithLoss().double()
    optimizer = maker(options)(model, shard_preconditioners=owned)
    sizes: list[int] = []
    optimizer.register_step_post_hook(lambda o, *_: sizes.append(o.batch_size))
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=10,
        save_steps=5,
        per_device_train_batch_size=4 // dist.get_world_size(),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        seed=1,
    )
    constant = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = Trainer(
        model, arguments, train_dataset=Examples(), optimizers=(optimizer, constant)
    )
    shard_by(trainer.accelerator, way)
    trainer.is_fsdp_enabled = way != "ddp"
    checkpoint = f"{folder}/checkpoint-5" if resume else None
    try:
        with warnings.catch_warnings():  # of torch, where a second run saves anew
            warnings.filterwarnings("ignore", "Detected an existing checkpoint")
            trainer.train(resume_from_checkpoint=checkpoint)
        return [whole(p) for p in model.parameters()], sizes
    finally:
        forget_accelerators()


def refused_in_trainer(folder: str) -> None:
    """Rank 0 alone would save what all own: told in the first step, on all ranks."""
    with pytest.raises(ValueError, match=r"shard_preconditioners' must be False.*fsdp"):
        train_by_trainer("ddp", "T=3", True, folder, False)
