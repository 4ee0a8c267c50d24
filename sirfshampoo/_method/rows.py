"""Tensors whose leading axis counts rows: units that are treated alike.

G stacks gradients, ``[rows, d_1, …, d_N]``; a mask or a size has one number a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from sirfshampoo._method import device
from sirfshampoo.structures.base import accumulation_dtype, per_matrix

#: Where entries of a float16 factor saturate: one update must not reach 65,504.
LARGEST_FLOAT16 = 4096.0


def mat(X: Tensor, n: int) -> Tensor:
    """Unfold ``[rows, d_1, …, d_N]`` along axis n into ``[rows, d_n, D / d_n]``."""
    return X.movedim(n + 1, 1).reshape(X.shape[0], X.shape[n + 1], -1)


def fold(X: Tensor, n: int, dims: Sequence[int]) -> Tensor:
    """Undo `mat`: fold ``[rows, d_n, D / d_n]`` to ``[rows, d_1, …, d_N]``."""
    others = [*dims[:n], *dims[n + 1 :]]
    return X.reshape(X.shape[0], dims[n], *others).movedim(1, n + 1)


def unless_all(mask: Tensor) -> Tensor | None:
    """Return a mask, or None if it holds everywhere and looking at it costs no wait.

    On the CPU that spares the passes that apply it; elsewhere the host would have to
    wait for the device.
    """
    return None if device.is_at_hand(mask) and bool(mask.all()) else mask


def both(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Return where two masks hold; None: everywhere."""
    return other if mask is None else mask if other is None else mask & other


def finite_rows(probes: Tensor) -> Tensor | None:
    """Return where numbers ``[rows]`` are finite, or None like `unless_all`."""
    if device.is_at_hand(probes) and isfinite(probes.sum().item()):
        return None
    return unless_all(probes.isfinite())


def number(values: Tensor) -> float | Tensor:
    """Return the only row's value as a number, if looking at it costs no wait.

    With a number, torch fuses products, and does not cast half-precision matrices.
    """
    single = values.numel() == 1 and device.is_at_hand(values)
    return values.item() if single else values


def magnitude(X: Tensor) -> Tensor:
    """Return the largest magnitude in each row, ``[rows]``, as float32 at least."""
    infinity, dtype = float("inf"), accumulation_dtype(X.dtype)
    largest: Tensor = torch.linalg.vector_norm(X.flatten(1), infinity, 1, dtype=dtype)
    return largest


def normalized(G: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its largest magnitude (if not 0); return that, too."""
    size = magnitude(G)
    size = torch.where(size == 0, torch.ones_like(size), size)
    return (G / per_matrix(size, G)).to(G.dtype), size
