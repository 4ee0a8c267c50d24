"""Matrix products as the structures need them: fused, in a layout, symmetric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

#: What a processor calls its instructions for products of a half-precision type.
_INSTRUCTIONS = {
    torch.bfloat16: ("amx_bf16", "avx512_bf16", "bf16"),
    torch.float16: ("amx_fp16", "avx512_fp16", "fp16_arith"),
}


def _without_instructions() -> tuple[torch.dtype, ...]:
    """Return the half-precision types that this processor has no instructions for.

    Where torch does not tell, these are all.
    """
    able: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return tuple(
        dtype
        for dtype, names in _INSTRUCTIONS.items()
        if not any(able.get(name) for name in names)
    )


_WIDENED = _without_instructions()


def is_widened(A: Tensor) -> bool:
    """Return whether products of A are computed in float32, then rounded.

    A processor that has no instructions for a type multiplies it number by number, up
    to a hundred times slower than float32.
    """
    return A.dtype in _WIDENED and A.device.type == "cpu"


def product(A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``scale * A @ B``; the scale costs no pass where torch can fuse it.

    Fused, it is applied before the product is rounded to the result's type, which is
    what keeps a half-precision product in range.
    """
    if scale == 0.0:  # torch leaves a half-precision result unwritten on a CPU
        return (A @ B).zero_()
    if is_widened(A):
        return product(A.float(), B.float(), scale).to(A.dtype)
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
    if is_widened(first):
        wide = [(X.float(), scale) for X, scale in terms]
        return S.copy_(sum_of_symmetric_products(*wide))
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
