"""Matrix products as the structures need them: fused, in a layout, symmetric."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def product(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * A @ B``; the scale costs no pass where torch can fuse it.

    Fused, it is applied before the product is rounded to the result's type, which is
    what keeps a half-precision product in range.
    """
    if scale == 0.0:  # torch leaves a half-precision result unwritten on a CPU
        return (A @ B).zero_()
    if A.ndim != B.ndim or A.ndim < 3:
        return A @ B if scale == 1.0 else (A @ B).mul_(scale)
    batch = A.shape[:-2]
    if len(batch) > 1:
        A, B = A.flatten(0, -3), B.flatten(0, -3)
    if scale == 1.0 and A.dtype.itemsize > 2:
        AB = torch.bmm(A, B)
    else:  # without a scale, too: `bmm` copies a transposed half-precision matrix
        AB = torch.baddbmm(A.new_empty(()), A, B, beta=0.0, alpha=scale)
    return AB if len(batch) == 1 else AB.unflatten(0, batch)


def is_column_major(X: Tensor) -> bool:
    """Return whether the rows of X lie scattered in memory, but its columns do not."""
    if torch.compiler.is_compiling():  # it lays out itself what it computes
        return False
    return X.stride(-2) == 1 and X.stride(-1) > 1


def product_like(A: Tensor, X: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * A @ X`` in the memory layout of X.

    What follows then combines it with tensors of that layout at full speed. A column
    has no layout: for it, A is taken as it lies, since some products copy what they
    need transposed.
    """
    if is_column_major(A if X.shape[-1] == 1 else X):
        return product(X.mT, A.mT, scale).mT
    return product(A, X, scale)


#: How many rows of a large X Xᵀ are computed at a time, up to the diagonal block only,
#: and from how many rows and columns on. Measured on a CPU: it saves a quarter at 1024
#: columns, and loses in bfloat16 below. A GPU wants a kernel for this.
_PANEL, _PANELS_FROM = 256, 512


def symmetric_product(X: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * X @ X.mT``; of large ones, one triangle is computed."""
    return sum_of_symmetric_products((X, scale))


def sum_of_symmetric_products(
    *terms: tuple[Tensor, float], out: Tensor | None = None
) -> Tensor:
    """Return the sum of ``scale * X @ X.mT`` over terms (X, scale) of equal rows."""
    first, _ = terms[0]
    *batch, d, _ = first.shape
    number = prod(batch)
    S = first.new_empty(*batch, d, d) if out is None else out
    terms = tuple(term for term in terms if term[1] != 0.0)  # as in `product`
    if not terms:
        return S.zero_()
    size = max(min(d, X.shape[-1]) for X, _ in terms)
    if number == 1 and size >= _PANELS_FROM and S.device.type == "cpu":
        _fill_symmetric(S.view(d, d), [(X.view(X.shape[-2:]), s) for X, s in terms])
        return S
    S3 = S.view(number, d, d)
    for i, (X, scale) in enumerate(terms):
        X3 = X.reshape(number, d, X.shape[-1])
        if i > 0 and X.shape[-1] == 1:  # batched products of columns are slow
            S3.addcmul_(X3, X3.mT, value=scale)
        else:
            S3.baddbmm_(X3, X3.mT, beta=0.0 if i == 0 else 1.0, alpha=scale)
    return S


def _fill_symmetric(S: Tensor, terms: Sequence[tuple[Tensor, float]]) -> None:
    """Fill S, ``[d, d]``, with the sum of symmetric products, panel by panel."""
    panels = [slice(i, min(i + _PANEL, len(S))) for i in range(0, len(S), _PANEL)]
    for rows in panels:
        panel = S[rows, : rows.stop]
        for i, (X, scale) in enumerate(terms):
            beta = 0.0 if i == 0 else 1.0
            panel.addmm_(X[rows], X[: rows.stop].mT, beta=beta, alpha=scale)
    for rows in panels[1:]:
        S[: rows.start, rows] = S[rows, : rows.start].mT
