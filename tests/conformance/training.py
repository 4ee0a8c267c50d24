"""The small problem that rows train on, and what it means to train alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]

#: The size of a batch that a step is taken on.
SIZE = 6
#: The size of a batch that must not count: far enough off to show in every number.
STRAY = 50


def new_model() -> nn.Sequential:
    """Build the same net every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def batches(steps: int, size: int = SIZE, seed: int = 0) -> list[Batch]:
    """Draw the same batches every time."""
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(size, 7, generator=generator) for _ in range(steps)]
    return [(numbers[:, :4].clone(), 1 + numbers[:, 4:]) for numbers in draw]


def stray_batch() -> Batch:
    """Draw a batch that no step is to see."""
    return batches(1, STRAY, seed=9)[0]


def loss_of(model: Callable[..., Tensor], batch: Batch) -> Tensor:
    """Return the mean loss over a batch."""
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def vector(source: nn.Module | Iterable[Tensor]) -> Tensor:
    """Return all parameters as one vector that does not change with them."""
    params = source.parameters() if isinstance(source, nn.Module) else source
    return torch.cat([p.detach().double().flatten() for p in params])


def params_of(optimizer: Any) -> list[nn.Parameter]:
    """Return the parameters that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(
    model: nn.Module,
    optimizer: Any,
    data: Iterable[Batch],
    forward: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Take a step on each batch.

    Args:
        model: The net whose parameters are looked at.
        optimizer: Takes the steps.
        data: The batches.
        forward: What is called to predict, if not the model itself.

    Returns:
        The parameters after each step, ``[steps, numbers]``.
    """
    path = []
    for batch in data:
        optimizer.zero_grad()
        loss_of(model if forward is None else forward, batch).backward()
        optimizer.step()
        path.append(vector(model))
    return torch.stack(path)


def gradients(params: Sequence[Tensor], seed: int, scale: float = 1.0) -> None:
    """Give parameters the same normal gradients every time."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = scale * torch.randn(p.shape, generator=generator).to(p.dtype)


def train_by_hand(optimizer: Any, params: Sequence[Tensor], steps: range) -> Tensor:
    """Take steps with gradients from thin air; return the path as `train` does."""
    path = []
    for seed in steps:
        gradients(params, seed)
        optimizer.step()
        path.append(vector(params))
    return torch.stack(path)


def plain_path(make: Any, data: Sequence[Batch]) -> Tensor:
    """Return the path of the plain loop; the batch size is told, not counted."""
    model = new_model()
    return train(model, make(model, batch_size=SIZE), data)


def same(found: Tensor, expected: Tensor, tolerance: float = 0.0) -> None:
    """Demand that two paths agree, to the bit or relative to the largest number.

    Raises:
        AssertionError: If they do not, or if one has a step that moves nothing: then
            the agreement would say little.
    """
    assert found.shape == expected.shape, f"{found.shape} is not {expected.shape}"
    assert found.isfinite().all(), "Numbers are not finite."
    for earlier, later in pairwise(expected):
        assert not torch.equal(earlier, later), "A step moved nothing."
    largest = expected.abs().max().item()
    gap = (found - expected).abs().max().item() / largest
    assert gap <= tolerance, f"The paths differ by {gap:.1e} of the largest number."


def mentions(error: Exception, *words: str) -> None:
    """Demand that the message of an error holds all the words."""
    missing = [word for word in words if word not in str(error)]
    if missing:
        raise AssertionError(f"{error!r} does not mention {missing}.")


@contextmanager
def refused(errors: Any, *words: str) -> Iterator[None]:
    """Demand an error whose message holds all the words."""
    try:
        yield
    except errors as error:
        mentions(error, *words)
    else:
        raise AssertionError(f"Nothing was refused; expected {errors}.")
