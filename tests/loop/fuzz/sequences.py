"""Sequences of operations, drawn and run."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from tests.loop.fuzz.configurations import CASES, LAYERS, Case
from tests.loop.fuzz.loop import Loop
from tests.loop.fuzz.references import OfTheTwin, Reference

Operation = tuple[Any, ...]


def operation(name: str, **arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Draw an operation with its arguments."""
    return st.tuples(st.just(name), st.fixed_dictionaries(arguments))


sizes, flags = st.integers(1, 5), st.booleans()
ways = st.sampled_from(["model first", "optimizer first", "pickle"])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])

OF_A_LOOP = [
    operation("train_on", size=sizes),
    operation("train_on", size=sizes),
    operation("step"),
    operation("step"),
    operation("zero_grad", set_to_none=flags),
]
OPERATIONS = [
    *OF_A_LOOP,
    operation("step_with_closure", size=sizes),
    operation("schedule"),
    operation("forward", size=sizes),
    operation("backward", last=st.integers(1, 3), retain=flags),
    operation("ask_for_gradient_of_inputs"),
    operation("evaluate", size=sizes),
    operation("set_mode", training=flags),
    operation("zero_grad_of_model", set_to_none=flags),
    operation("clip"),
    operation("spoil", number=st.integers(0, 7)),
    operation("spoil", number=st.integers(0, 7)),
    operation("put_back"),
    operation(
        "set_trainable",
        layer=st.integers(0, 3),
        part=st.sampled_from(["both", "weight", "bias"]),
        trainable=flags,
    ),
    operation("join"),
    operation("resume", thawed=flags),
    operation("save"),
    operation("roll_back"),
    operation("load_own"),
    operation("copy", how=ways),
    operation("copy_and_go_on", how=ways),
]


@dataclass(frozen=True)
class Sequence:
    """What a training loop does."""

    case: str
    late: bool  # whether the last layer joins later, if at all
    frozen: tuple[str, ...]  # at the start
    operations: list[Operation]


def sequences(
    operations: list[st.SearchStrategy[Operation]], longest: int
) -> st.SearchStrategy[Sequence]:
    """Draw sequences of operations."""
    every = st.sampled_from(operations).flatmap(lambda drawn: drawn)
    layers = st.sets(st.sampled_from(LAYERS), max_size=2)
    return st.builds(
        Sequence,
        case=st.sampled_from(list(CASES)),
        late=flags,
        frozen=st.one_of(st.just(()), layers.map(sorted).map(tuple)),
        operations=st.lists(every, min_size=longest // 2, max_size=longest),
    )


#: Warnings that are right, and no concern of these tests.
EXPECTED = (
    "The optimizer counts",  # another batch size than the recipe was told
    "Detected call of `lr_scheduler.step",  # a scheduler stepped first
    "Seems like `optimizer.step",  # a copy has no wrapper around its step
    "The state dict holds nothing for",  # layers that were frozen all the time
    "No parameter of the optimizer has a gradient",
)


@contextmanager
def expected_warnings_ignored() -> Iterator[None]:
    """Let warnings pass that come from what was drawn."""
    with warnings.catch_warnings():
        for start in EXPECTED:
            warnings.filterwarnings("ignore", message=start)
        yield


def run(
    sequence: Sequence,
    reference: Callable[[Case, nn.Module, bool], Reference] = OfTheTwin,
) -> None:
    """Run a sequence, and compare after each operation."""
    torch.manual_seed(0)
    with expected_warnings_ignored():
        loop = Loop(CASES[sequence.case], sequence.late, reference, sequence.frozen)
        for name, arguments in sequence.operations:
            getattr(loop, name)(**arguments)
            loop.check()
