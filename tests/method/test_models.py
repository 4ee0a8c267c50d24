"""Every kind of layer trains, and follows the twin on its real gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import sirfshampoo
from sirfshampoo import SIRFShampoo
from tests.cases import FAST, MODELS, build, mixture
from tests.twin import Twin, assert_agree, find_units

BATCH = 6
STEPS = 5

each_model = pytest.mark.parametrize("name", MODELS)
each_structure = pytest.mark.parametrize(
    "structures",
    ["dense", mixture(1), mixture(4)],
    ids=["dense", "mixture", "other-mixture"],
)
RULES = {
    "alone": ("PerParameter",),
    "flat-kernels": ("FlattenKernel",),
    "joint": ("LinearWeightBias", "PerParameter"),
    "joint-and-flat": ("FlattenEmbedding", "LinearWeightBias", "PerParameter"),
}
each_rule = pytest.mark.parametrize("rules", RULES.values(), ids=RULES)


def make_optimizer(
    model: nn.Module, rules: tuple[str, ...] = ("PerParameter",), **config: Any
) -> SIRFShampoo:
    """Set up the optimizer with rules by name."""
    combine_params = tuple(getattr(sirfshampoo, rule)() for rule in rules)
    return SIRFShampoo(model, combine_params=combine_params, **config)


def backward(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Compute gradients of the mean loss, and return it."""
    model.zero_grad()
    loss = mse_loss(model(x), y)
    loss.backward()
    return loss.item()


@each_model
@each_rule
@each_structure
def test_follows_the_twin_on_real_gradients(
    name: str, rules: tuple[str, ...], structures: Any
) -> None:
    model, x, y = build(name, BATCH)
    config = {**FAST, "kappa": 0.01, "structures": structures}
    optimizer = make_optimizer(model, rules, **config)  # counts the examples itself
    twin = Twin(find_units(model, rules), **config)
    for step in range(STEPS):
        backward(model, x[step % 2 :], y[step % 2 :])  # two batch sizes
        gradients = {p: p.grad.clone() for p in model.parameters()}
        optimizer.step()
        twin.step(gradients, BATCH - step % 2)
    assert_agree(twin, optimizer, 1e-12)


@each_model
@pytest.mark.parametrize(
    "structures",
    ["dense", "diagonal", "triltoeplitz", mixture(2)],
    ids=["dense", "diagonal", "triltoeplitz", "mixture"],
)
def test_trains(name: str, structures: Any) -> None:
    model, x, y = build(name, BATCH, torch.float32)
    optimizer = make_optimizer(
        model, RULES["joint"], lr=0.01, beta2=0.1, lam=0.1, structures=structures
    )
    first = backward(model, x, y)
    for _ in range(30):
        backward(model, x, y)
        optimizer.step()
    assert backward(model, x, y) < 0.8 * first  # most fall below a third


@each_model
def test_the_list_holds_what_it_says(name: str) -> None:
    model, x, y = build(name, BATCH)
    assert len(x) == len(y) == BATCH
    backward(model, x, y)
    assert all(p.grad is not None for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
