"""Tensors whose leading axis counts rows: units that are treated alike.

G stacks gradients, ``[rows, d_1, …, d_N]``; a mask or a size has one number a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite

import torch
from torch import Tensor

from sirfshampoo._method import device
from sirfshampoo.structures.base import accumulation_dtype, per_matrix

#: Where entries of a float16 factor saturate: one update must not reach 65,504.
LARGEST_FLOAT16 = 4096.0

#: Up to this length of rows, products with them take longer than a copy to long ones.
_SHORT = 16


def mat(X: Tensor, n: int) -> Tensor:
    """Unfold ``[rows, d_1, …, d_N]`` along axis n into ``[rows, d_n, D / d_n]``."""
    d = X.shape[n + 1]
    if n == X.ndim - 2 and d > _SHORT:  # without a copy
        return X.reshape(len(X), -1, d).mT
    return X.movedim(n + 1, 1).reshape(len(X), d, -1).contiguous()


def along_axes(X: Tensor, multiply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Return X ×_1 P_1 ×_2 … ×_N P_N.

    Args:
        X: A tensor, ``[rows, d_1, …, d_N]``.
        multiply: Multiplies P_n, for n from 0, onto a matrix ``[rows, d_n, columns]``.
            It is called for the last axis first.
    """
    rows, *dims = X.shape
    order = list(range(len(dims)))  # of the axes in memory: each copy costs
    for n in reversed(range(len(dims))):
        if n > 0 and n == order[-1] and dims[n] > _SHORT:
            X = multiply(n, X.reshape(rows, -1, dims[n]).mT).mT
        else:
            wanted = sorted(order) if n == 0 else [n, *(i for i in order if i != n)]
            if wanted != order:
                X = X.permute(0, *(order.index(i) + 1 for i in wanted))
                order = wanted
            X = multiply(n, X.reshape(rows, dims[n], -1).contiguous())
        X = X.reshape(rows, *(dims[i] for i in order))
    return X


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


def each(values: Tensor) -> Sequence[float | Tensor]:
    """Return the parts of ``[n, rows]``: of a single row as numbers, where at hand.

    With a number, torch fuses products, and does not cast half-precision matrices.
    """
    if values.shape[1] == 1 and device.is_at_hand(values):
        numbers: list[float] = values.flatten().tolist()
        return numbers
    return values.unbind(0)


def magnitude(X: Tensor) -> Tensor:
    """Return the largest magnitude in each row, ``[rows]``, as float32 at least."""
    # on a CPU, the norm of this order takes ten times as long
    return X.flatten(1).abs().amax(1).to(accumulation_dtype(X.dtype))


def normalized(G: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its largest magnitude (if not 0); return that, too."""
    size = magnitude(G)
    size = torch.where(size == 0, torch.ones_like(size), size)
    return (G / per_matrix(size, G)).to(G.dtype), size
