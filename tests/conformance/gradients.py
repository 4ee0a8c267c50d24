"""Gradients that are not finite, far from normal, zero or missing."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import nn

from sirfshampoo import LinearWeightBias, PerParameter

from .row import OURS, Contestant, Section
from .training import SIZE, gradients, new_model, params_of, refused, vector

SECTION = Section("Gradients that are not normal")
row = SECTION.row


def everything(optimizer: Any, p: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return copies of a parameter and its state, less what counts steps."""
    kept = {"": p.detach().clone()}
    for key, tensor in optimizer.state[p].items():
        if key not in ("step", "skipped"):
            kept[key] = tensor.detach().clone()
    return kept


def check_poison(make: Contestant, value: float) -> None:
    """Check that one bad entry in one step rests one parameter, and leaves no trace."""
    model, twin = new_model(), new_model()
    optimizer, other = make(model, batch_size=SIZE), make(twin, batch_size=SIZE)
    bad = next(iter(model.parameters()))
    for step in range(6):
        gradients(list(model.parameters()), step)
        gradients(list(twin.parameters()), step)
        if step == 3:
            bad.grad.view(-1)[5] = value
            next(twin.parameters()).grad = None
            before = everything(optimizer, bad)
            others = vector(list(model.parameters())[1:])
        optimizer.step()
        other.step()
        if step == 3:
            for key, tensor in everything(optimizer, bad).items():
                assert torch.equal(tensor, before[key]), key or "the parameter"
            assert not torch.equal(vector(list(model.parameters())[1:]), others)
    assert torch.equal(vector(model), vector(twin))
    assert not torch.equal(bad.detach(), before[""])


@row("A NaN in a gradient: the parameter rests for the step, no trace")
def nan(make: Contestant) -> None:
    check_poison(make, math.nan)


@row("An infinity in a gradient: the parameter rests for the step, no trace")
def infinity(make: Contestant) -> None:
    check_poison(make, math.inf)
    check_poison(make, -math.inf)


@row("NaN in all gradients of one step: training goes on afterwards")
def all_nan(make: Contestant) -> None:
    model, twin = new_model(), new_model()
    optimizer, other = make(model, batch_size=SIZE), make(twin, batch_size=SIZE)
    for step in range(6):
        gradients(list(model.parameters()), step)
        if step == 3:
            for p in model.parameters():
                p.grad.fill_(math.nan)
        else:
            gradients(list(twin.parameters()), step)
            other.step()
        optimizer.step()
    assert vector(model).isfinite().all(), "Parameters are not finite."
    assert torch.equal(vector(model), vector(twin))


@row("A counter in the state says how often", only=OURS)
def counter(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    first, *rest = model.parameters()
    for step in range(5):
        gradients([first, *rest], step)
        if step in (1, 2, 4):
            first.grad[0, 0] = math.nan
        optimizer.step()
    assert optimizer.state[first]["skipped"] == 3
    assert all(optimizer.state[p]["skipped"] == 0 for p in rest)


@row("A step waits for no device: it runs where there are no numbers to read")
def no_waiting(make: Contestant) -> None:
    model = new_model().to("meta")  # reading a number raises there
    optimizer = make(model, batch_size=SIZE)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    for p in model.parameters():
        assert optimizer.state[p]["step"] == 3
        assert p.is_meta


@row("`optimizer.debug = True` names the parameters", only=OURS)
def debug(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    optimizer.debug = True
    gradients(params_of(optimizer), 0)
    optimizer.step()  # nothing to warn of
    gradients(params_of(optimizer), 1)
    model[2].weight.grad[1, 1] = math.inf
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    (warning,) = caught
    assert warning.category is UserWarning
    assert "2.weight" in str(warning.message), warning.message
    assert "0.weight" not in str(warning.message), warning.message


def scaled_path(
    make: Contestant, scale: float, dtype: torch.dtype, **options: Any
) -> tuple[torch.Tensor, bool]:
    """Take steps with gradients far from normal; everything must stay finite.

    Returns:
        The last parameters, and whether every step moved every parameter.
    """
    model = new_model().to(dtype)
    if make.name == OURS.name:
        # its step follows the size of the gradient: parameters shall visibly move
        options["lr"] = 0.05 / scale
    optimizer = make(model, batch_size=SIZE, **options)
    params = params_of(optimizer)
    moved = True
    for step in range(50):
        gradients(params, step, scale)
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for p, earlier in zip(params, before, strict=True):
            assert p.isfinite().all(), f"Step {step} made a parameter infinite or NaN."
            moved &= not torch.equal(p, earlier)
    for entries in optimizer.state.values():
        for key, tensor in entries.items():
            assert tensor.isfinite().all(), f"{key} is not finite."
    return vector(model), moved


#: How far the end may be from that of float64, relative to the way.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


def check_effect(
    make: Contestant, scale: float, dtype: torch.dtype, **options: Any
) -> None:
    """Check that every step counts, and leads where one in float64 does."""
    found, moved = scaled_path(make, scale, torch.float32, **options)
    assert moved, "A step moved nothing."
    expected, _ = scaled_path(make, scale, torch.float64)
    way = (expected - vector(new_model())).norm()
    gap = ((found - expected).norm() / way).item()
    assert gap < CLOSE[dtype], f"The end is {gap:.1e} of the way from that of float64."


def add_scales() -> None:
    """Add rows for gradients far from normal; AdamW has no factors."""
    for text, scale in (("10⁶", 1e6), ("10²⁰", 1e20), ("10⁻⁹", 1e-9)):
        for dtype in CLOSE:
            only = None if dtype is torch.float32 else OURS
            factors = f", {str(dtype).removeprefix('torch.')} factors" if only else ""
            options = {"preconditioner_dtypes": dtype} if only else {}

            @row(f"Gradients × {text}{factors}: all finite", only=only)
            def finite(
                make: Contestant, scale: float = scale, options: Any = options
            ) -> None:
                scaled_path(make, scale, torch.float32, **options)

            @row(f"Gradients × {text}{factors}: steps as in float64", only=only)
            def effect(
                make: Contestant,
                scale: float = scale,
                dtype: torch.dtype = dtype,
                options: Any = options,
            ) -> None:
                check_effect(make, scale, dtype, **options)


add_scales()


def check_zeros(make: Contestant, **options: Any) -> None:
    """Check 200 steps of zero gradients, and a step of normal ones afterwards."""
    model = new_model()
    optimizer = make(model, batch_size=SIZE, **options)
    before = vector(model)
    for _ in range(200):
        gradients(params_of(optimizer), 0, scale=0.0)
        optimizer.step()
    assert torch.equal(vector(model), before)
    for entries in optimizer.state.values():
        for key, tensor in entries.items():
            assert tensor.isfinite().all(), f"{key} is not finite."
    gradients(params_of(optimizer), 0)
    optimizer.step()
    assert vector(model).isfinite().all()
    assert not torch.equal(vector(model), before)


@row("Zero gradients for 200 steps")
def zeros(make: Contestant) -> None:
    check_zeros(make)


@row("Zero gradients for 200 steps, half-precision factors", only=OURS)
def zeros_in_half(make: Contestant) -> None:
    check_zeros(make, preconditioner_dtypes=torch.bfloat16)
    check_zeros(make, preconditioner_dtypes=torch.float16)


@row("A gradient that is None: the parameter rests")
def missing(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    params = list(model.parameters())
    for step in range(4):
        gradients(params, step)
        if step == 2:
            params[0].grad = None
            before = everything(optimizer, params[0])
            others = vector(params[1:])
        optimizer.step()
        if step == 2:
            for key, tensor in everything(optimizer, params[0]).items():
                assert torch.equal(tensor, before[key]), key
            assert not torch.equal(vector(params[1:]), others)
    assert not torch.equal(params[0], before[""])


@row("A layer's weight trains on when its bias is frozen")
def partly_missing(make: Contestant) -> None:
    model = new_model()
    joined = {"combine_params": (LinearWeightBias(), PerParameter())}
    optimizer = make(model, batch_size=SIZE, **(joined if make is OURS else {}))
    for step in range(3):
        gradients(params_of(optimizer), step)
        if step > 0:
            model[0].bias.grad = None
        bias, weight = model[0].bias.clone(), model[0].weight.clone()
        optimizer.step()
        assert torch.equal(model[0].bias, bias) == (step > 0)
        assert not torch.equal(model[0].weight, weight)


@row("A sparse gradient is refused by name")
def sparse(make: Contestant) -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = make(model, batch_size=SIZE)
    before = vector(model)
    model(torch.tensor([1, 2])).sum().backward()
    with refused(RuntimeError, "sparse"):
        optimizer.step()
    assert torch.equal(vector(model), before)
