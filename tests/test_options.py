"""The options beyond the documented ones do what they say, and resume exactly."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from sirfshampoo import GrowingInterval, SIRFShampoo, recipe

OPTIONS: dict[str, Any] = {
    "initial_factors": "gradient",
    "momentum_first": True,
    "max_update_rms": 0.01,
    "T": GrowingInterval(3),
    "beta2": 0.2,
    "lam": 1e-6,
}


def set_gradients(model: nn.Module, seed: int) -> None:
    """Set normal gradients that follow from a seed."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = 1e-3 * torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("T", [1, 2, 3, 10])
def test_the_interval_grows_with_the_logarithm_of_the_step(T: int) -> None:
    rule, expected, due = GrowingInterval(T), [], 0
    for step in range(5000):
        expected.append(step == due)
        if step == due:
            interval, power = 0, 4  # the number of powers of 4 up to step + 1
            while power <= step + 1:
                interval, power = interval + 1, 4 * power
            due += min(max(interval, 1), T)
    assert [rule(step) for step in range(5000)] == expected


def test_an_interval_can_be_copied_and_told() -> None:
    rule = GrowingInterval(10)
    assert pickle.loads(pickle.dumps(rule)) == copy.deepcopy(rule) == rule
    assert repr(rule) == "GrowingInterval(T=10)"
    with pytest.raises(ValueError, match="'T' must be an integer > 0, got 0"):
        GrowingInterval(0)


def test_factors_start_in_the_first_finite_update_and_only_then() -> None:
    model = nn.Linear(4, 3, bias=False)
    optimizer = SIRFShampoo(
        model, batch_size=8, initial_factors="gradient", lam=0.0, beta2=0.0
    )
    before = model.weight.detach().clone()
    for bad in (float("nan"), 0.0):  # nothing to start from
        model.weight.grad = torch.full((3, 4), bad)
        optimizer.step()
        assert all(not K.to_dense().any() for K in optimizer.preconditioner[0])
    assert torch.equal(model.weight.detach(), before)
    for size in (0.5, 7.0):  # the second does not start them again
        model.weight.grad = torch.full((3, 4), size)
        optimizer.step()
        for K in optimizer.preconditioner[0]:
            expected = (8 * 0.5**2) ** -0.25 * torch.eye(K.dim)
            torch.testing.assert_close(K.to_dense(), expected)


@pytest.mark.parametrize("momentum_first", [False, True])
def test_no_update_exceeds_the_maximum(momentum_first: bool) -> None:
    model = nn.Linear(4, 3)
    optimizer = SIRFShampoo(
        model,
        batch_size=8,
        lr=10.0,
        alpha1=0.0,
        momentum_first=momentum_first,
        max_update_rms=0.01,
    )
    for seed in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        set_gradients(model, seed)
        for p in model.parameters():
            p.grad = 100 * p.grad if p.grad is not None else None
        told = optimizer.diagnostics()
        optimizer.step()
        for p, old in zip(model.parameters(), before, strict=True):
            assert (p.detach() - old).square().mean().sqrt() <= 0.01 * (1 + 1e-5)
        assert told["weight/update_rms"] <= 0.01 * (1 + 1e-5)


def test_a_nan_leaves_the_momentum_of_gradients_as_it_is() -> None:
    model = nn.Linear(4, 3)
    optimizer = SIRFShampoo(model, batch_size=8, momentum_first=True)
    set_gradients(model, 0)
    optimizer.step()
    V = optimizer.state[model.weight]["momentum_buffer"].clone()
    weight = model.weight.detach().clone()
    model.weight.grad = torch.full((3, 4), float("nan"))
    optimizer.step()
    assert torch.equal(optimizer.state[model.weight]["momentum_buffer"], V)
    assert torch.equal(model.weight.detach(), weight)
    assert int(optimizer.state[model.weight]["skipped"]) == 1


@pytest.mark.parametrize("taken", [0, 1, 17])
def test_training_resumes_to_the_bit_with_all_options(taken: int) -> None:
    models = [nn.Linear(5, 4), nn.Linear(5, 4)]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (SIRFShampoo(m, batch_size=8, **OPTIONS) for m in models)
    for step in range(taken):
        set_gradients(models[0], step)
        first.step()
    file = io.BytesIO()
    torch.save([models[0].state_dict(), first.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    models[1].load_state_dict(weights)
    second.load_state_dict(state)
    for step in range(taken, taken + 20):
        for model, optimizer in zip(models, (first, second), strict=True):
            set_gradients(model, step)
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("initial_factors", "zero"),
        ("momentum_first", 1),
        ("max_update_rms", 0.0),
        ("max_update_rms", float("inf")),
    ],
)
def test_wrong_options_are_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"'{option}' must be"):
        SIRFShampoo(nn.Linear(3, 2), **{option: value})


def test_the_recipe_scales_with_batch_and_model_and_shrinks_as_adamw() -> None:
    model = nn.Sequential(nn.Linear(40, 5), nn.LayerNorm(5), nn.Embedding(60, 7))
    arguments = recipe(model, batch_size=32, weight_decay=0.1, max_dense=50)
    assert arguments["lr"] * arguments["kappa"] == pytest.approx(1e-3 * 0.1)
    more = recipe(model, batch_size=128, lr=2e-3)
    assert more["lr"] == pytest.approx(4 * arguments["lr"])
    optimizer = SIRFShampoo(model, batch_size=32, **arguments)
    structures = {
        tuple(group["params"][0].shape): group["structures"]
        for group in optimizer.param_groups
    }
    assert structures[5, 40] == ("dense", "dense")
    assert structures[60, 7] == ("diagonal", "dense")
    assert structures[(5,)] == ("diagonal",)


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"batch_size": 8, "lr": 0.0}])
def test_the_recipe_refuses_what_is_wrong(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"Argument '(batch_size|lr)' must be"):
        recipe(nn.Linear(3, 2), **arguments)
