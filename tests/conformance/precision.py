"""Mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .row import Contestant, Section
from .training import (
    Batch,
    batches,
    loss_of,
    new_model,
    plain_path,
    same,
    stray_batch,
    vector,
)

SECTION = Section("Mixed precision")
row = SECTION.row

Scaled = Callable[[nn.Module, Any, Any, Batch, float], None]


def start_zero(
    model: nn.Module, optimizer: Any, scaler: Any, batch: Batch, factor: float
) -> None:
    """Forget gradients before the forward pass."""
    optimizer.zero_grad()
    scaler.scale(loss_of(model, batch) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def middle_zero(
    model: nn.Module, optimizer: Any, scaler: Any, batch: Batch, factor: float
) -> None:
    """Forget gradients between the forward and the backward pass."""
    loss = loss_of(model, batch) * factor
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()


def end_zero(
    model: nn.Module, optimizer: Any, scaler: Any, batch: Batch, factor: float
) -> None:
    """Forget gradients after the step, and clip them before."""
    scaler.scale(loss_of(model, batch) * factor).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e6)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()


def check_scaled(make: Contestant, iteration: Scaled, skip: bool) -> None:
    """Check that scaled steps equal plain ones, and that skipped ones leave no trace.

    Scales are powers of two, so that nothing is rounded.
    """
    data, model = batches(6), new_model()
    optimizer = make(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    path = []
    for step, batch in enumerate(data):
        if skip and step in (0, 3):
            before = vector(model)
            iteration(model, optimizer, scaler, stray_batch(), float("inf"))
            assert torch.equal(vector(model), before)
        iteration(model, optimizer, scaler, batch, 1.0)
        path.append(vector(model))
    assert scaler.get_scale() == (256.0 if skip else 1024.0)
    same(torch.stack(path), plain_path(make, data))


@row("`GradScaler`")
def scaled(make: Contestant) -> None:
    for iteration in (start_zero, middle_zero, end_zero):
        check_scaled(make, iteration, skip=False)


@row("`GradScaler` skips a step: no trace of it, nor of its examples")
def skipped(make: Contestant) -> None:
    for iteration in (start_zero, middle_zero, end_zero):
        check_scaled(make, iteration, skip=True)


@row("`autocast` of the forward pass to bfloat16")
def autocast(make: Contestant) -> None:
    data, paths, losses = batches(8), [], []
    for told in ({"batch_size": 6}, {}):
        model = new_model()
        optimizer = make(model, **told)
        path = []
        for batch in data:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                out = model(batch[0])
            assert out.dtype is torch.bfloat16
            loss = nn.functional.mse_loss(out.float(), batch[1])
            loss.backward()
            optimizer.step()
            path.append(vector(model))
            losses.append(loss_of(model, data[0]).item())
        paths.append(torch.stack(path))
    same(paths[1], paths[0])
    same(paths[1], plain_path(make, data), tolerance=0.1)
    assert losses[-1] < losses[0], losses


@row("Parameters in bfloat16 stay so, with their gradients")
def low_parameters(make: Contestant) -> None:
    paths = []
    data = [(x.bfloat16(), y.bfloat16()) for x, y in batches(8)]
    for told in ({"batch_size": 6}, {}):
        model = new_model().bfloat16()
        optimizer = make(model, **told)
        path = []
        for batch in data:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()
            path.append(vector(model))
        paths.append(torch.stack(path))
        assert all(p.dtype is torch.bfloat16 for p in model.parameters())
    same(paths[1], paths[0])
    same(paths[1], plain_path(make, batches(8)), tolerance=0.2)
