"""Drawn loops find bugs, each within a hundred."""

from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from torch import Tensor

from sirfshampoo._engine import step, unit_optimizer
from sirfshampoo._engine.batch_size import BatchSizeCounter
from sirfshampoo._engine.forward_hook import ForwardHook
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.tally import Tally
from sirfshampoo._engine.unit_optimizer import UnitOptimizer
from sirfshampoo._method import elementwise, factors
from tests.loop.fuzz.sequences import OPERATIONS, Sequence, run, sequences


def nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def count_at_once(
    self: BatchSizeCounter, training: bool, args: Any, kwargs: Any, output: Any
) -> None:
    """Count a forward pass without waiting for its gradients."""
    self._tally.add(len(args[0]) if training and torch.is_grad_enabled() else 0)


def lose_global_step(*args: Any) -> Any:
    """Check a state dict, and lose one number."""
    return CHECK_FIT(*args)[0], None


def lose_momenta(self: Stack, state: dict[Tensor, dict[str, Tensor]]) -> None:
    """Start with momenta of 0 wherever stacks are built anew."""
    for unit in self.units:
        for p in unit.params:
            state[p].pop(self.momentum, None)
    PLACE(self, state)


def leave_out_late_groups(self: Any, param_group: dict[str, Any]) -> None:
    """Take no parameters once there are some."""
    if not self.param_groups:
        ADD_PARAM_GROUP(self, param_group)


CHECK_FIT, PLACE = unit_optimizer.check_fit, Stack.place
ADD_PARAM_GROUP = UnitOptimizer.add_param_group

#: What is patched: an object, its attribute, what stands there.
BUGS: dict[str, list[tuple[Any, str, Any]]] = {
    "counts are never forgotten": [
        (Tally, "forget", nothing),
        (Tally, "close", nothing),
    ],
    "discarded batches count": [(BatchSizeCounter, "note", count_at_once)],
    "a copy counts for nobody": [(ForwardHook, "attach", nothing)],
    "the global step is not loaded": [(unit_optimizer, "check_fit", lose_global_step)],
    "a checkpoint is not loaded": [(UnitOptimizer, "load_state_dict", nothing)],
    "momenta are lost on the way": [(Stack, "place", lose_momenta)],
    "what is not finite moves": [
        (module, "finite_rows", nothing) for module in (step, factors, elementwise)
    ],
    "late groups do not train": [
        (UnitOptimizer, "add_param_group", leave_out_late_groups)
    ],
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found_within_a_hundred_loops(
    bug: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for patch in BUGS[bug]:
        monkeypatch.setattr(*patch)
    found: list[BaseException] = []

    @settings(max_examples=100, phases=[Phase.generate])
    @given(sequences(OPERATIONS, longest=30))
    def search(sequence: Sequence) -> None:
        if not found:
            try:
                run(sequence)
            except (Exception, pytest.fail.Exception) as failure:
                found.append(failure)

    search()
    assert found
