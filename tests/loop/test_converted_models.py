"""A model is scripted or exported while an optimizer counts its examples."""

import pytest
import torch
from torch import nn

from sirfshampoo import SIRFShampoo
from tests.versions import needs_torch

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def step_of(model: nn.Module, optimizer: SIRFShampoo, x: torch.Tensor) -> int:
    """Take a step; return the batch size that was counted for it."""
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer._batch_size.value


@pytest.mark.parametrize(
    "strict",
    [
        False,
        pytest.param(True, marks=needs_torch(9, "the hook stops a strict export")),
    ],
)
def test_an_exported_model_goes_on_counting(strict: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(5, 3)
    optimizer = SIRFShampoo(model)
    assert step_of(model, optimizer, x) == 5
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
    assert step_of(model, optimizer, x[:2]) == 2


def test_scripting_says_what_to_do_and_does_it_without_the_hook() -> None:
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    optimizer = SIRFShampoo(model)
    with pytest.raises(AttributeError, match=r"del optimizer.*'batch_size'.*integer"):
        torch.jit.script(model)
    assert step_of(model, optimizer, x) == 5
    del optimizer
    assert torch.equal(torch.jit.script(model)(x), model(x))
    optimizer = SIRFShampoo(model, batch_size=5)
    assert torch.equal(torch.jit.script(model)(x), model(x))
    assert step_of(model, optimizer, x) == 5


def test_a_scripted_model_is_trained_with_an_integer_batch_size() -> None:
    scripted, x = torch.jit.script(nn.Linear(3, 2)), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"'batch_size' must be an integer.*script"):
        SIRFShampoo(scripted)
    before = scripted(x)
    assert step_of(scripted, SIRFShampoo(scripted, batch_size=5), x) == 5
    assert not torch.equal(scripted(x), before)
