"""The batch size where users lay hands on ``.grad`` between backward passes."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from sirfshampoo import SIRFShampoo


def train_on(model: nn.Module, size: int) -> None:
    model(torch.randn(size, 3)).square().mean().backward()


def take_out(model: nn.Module) -> list[Tensor]:
    """Return the gradients; leave None."""
    taken = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    return taken


def put_back(model: nn.Module, taken: list[Tensor]) -> None:
    for p, gradient in zip(model.parameters(), taken, strict=True):
        p.grad = gradient


def add_back(model: nn.Module, taken: list[Tensor]) -> None:
    for p, gradient in zip(model.parameters(), taken, strict=True):
        p.grad += gradient


def zero_each(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad.zero_()


def replace_by_zeros(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.zeros_like(p)


RESETS: dict[str, Callable[[nn.Module], None]] = {
    "model.zero_grad(set_to_none=False)": lambda m: m.zero_grad(set_to_none=False),
    "each by zero_": zero_each,
    "new zeros": replace_by_zeros,
}


@pytest.mark.parametrize("name", RESETS)
def test_gradients_that_were_set_to_zero_do_not_count(name: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    for _ in range(2):
        train_on(model, 9)
        RESETS[name](model)
        train_on(model, 4)
        train_on(model, 2)
        optimizer.step()
        assert optimizer.batch_size == 6
        RESETS[name](model)


def test_gradients_that_were_scaled_still_count() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, 4)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    train_on(model, 5)
    optimizer.step()
    assert optimizer.batch_size == 9


@pytest.mark.parametrize("between", [0, 7])
@pytest.mark.parametrize("after", [0, 5])
def test_gradients_that_are_put_back_count(between: int, after: int) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, 4)
    taken = take_out(model)
    if between:
        train_on(model, between)
        assert optimizer.batch_size == between
    put_back(model, taken)
    assert optimizer.batch_size == 4
    if after:
        train_on(model, after)
    optimizer.step()
    assert optimizer.batch_size == 4 + after


def test_gradients_taken_out_before_zero_grad_count_when_they_are_back() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, 4)
    taken = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    train_on(model, 7)
    put_back(model, taken)
    optimizer.step()
    assert optimizer.batch_size == 4
    put_back(model, taken)  # whose step is done
    with pytest.raises(RuntimeError, match="No examples were counted"):
        optimizer.step()


@pytest.mark.parametrize("into", ["present", "taken"])
def test_gradients_that_may_have_been_added_are_told(into: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, 4)
    taken = take_out(model)
    train_on(model, 7)
    if into == "present":
        add_back(model, taken)
    else:
        second = take_out(model)
        put_back(model, taken)
        add_back(model, second)
    with pytest.warns(UserWarning, match=r"the batch size is 11, and not [47]: pass"):
        optimizer.step()
    optimizer.zero_grad()
    train_on(model, 5)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()  # without a word
    assert optimizer.batch_size == 5


@pytest.mark.parametrize("kept", [False, True])
def test_a_discarded_batch_before_a_clipped_one_is_no_mistake(kept: bool) -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, 9)
    log = [p.grad.clone() if kept else p.grad.norm() for p in model.parameters()]
    model.zero_grad()
    train_on(model, 4)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()
    assert optimizer.batch_size == 4
    assert len(log) == 2


def test_a_copy_counts_for_itself() -> None:
    model = nn.Linear(3, 2)
    optimizer = SIRFShampoo(model)
    train_on(model, 4)
    taken = take_out(model)
    train_on(model, 7)
    other_model, other = deepcopy((model, optimizer))
    train_on(other_model, 2)
    other.step()
    assert other.batch_size == 2
    put_back(model, taken)
    optimizer.step()
    assert optimizer.batch_size == 4
