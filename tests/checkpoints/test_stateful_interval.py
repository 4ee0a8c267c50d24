"""A callable `T` that remembers something goes on where it was."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sirfshampoo import SIRFShampoo


class EveryOther:
    """Says yes to every second call, whatever the step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, step: int) -> bool:
        self.calls += 1
        return self.calls % 2 == 0

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.calls = state_dict["calls"]


def new_run(T: Any) -> tuple[nn.Module, SIRFShampoo]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    return model, SIRFShampoo(model, batch_size=2, beta2=0.1, T=T)


def steps(model: nn.Module, optimizer: SIRFShampoo, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=draw, dtype=p.dtype)
        optimizer.step()


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_stateful_interval_resumes_with_the_optimizer() -> None:
    model, optimizer = new_run(EveryOther())
    steps(model, optimizer, 0, 3)
    saved = through_a_file([model.state_dict(), optimizer.state_dict()])
    steps(model, optimizer, 3, 8)
    other, resumed = new_run(EveryOther())
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert [group["T"].calls for group in resumed.param_groups] == [3, 3]
    steps(other, resumed, 3, 8)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
    first, second = (group["T"] for group in resumed.param_groups)
    assert first is not second
    assert first.calls == second.calls == 8


@pytest.mark.parametrize("flatten", [False, True])
def test_a_stateful_interval_passes_through_distributed_checkpoints(
    flatten: bool,
) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = new_run(EveryOther())
    steps(model, optimizer, 0, 3)
    saved = through_a_file(get_optimizer_state_dict(model, optimizer, options=options))
    other, resumed = new_run(EveryOther())
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert [group["T"].calls for group in resumed.param_groups] == [3, 3]


@pytest.mark.parametrize("T", [1, lambda step: True])
def test_a_saved_interval_without_a_place_is_refused(T: Any) -> None:
    _, optimizer = new_run(EveryOther())
    _, other = new_run(T)
    with pytest.raises(ValueError, match="'T' without state in group 0"):
        other.load_state_dict(optimizer.state_dict())
