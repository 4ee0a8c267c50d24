"""How Kronecker factors multiply gradients: G becomes U."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from sirfshampoo._method.rows import along_axes, normalized
from sirfshampoo.structures import StructuredMatrix
from sirfshampoo.structures.base import accumulation_dtype, per_matrix
from sirfshampoo.structures.products import is_column_major


class Form(NamedTuple):
    """How the factor K of an axis is multiplied onto gradients.

    Attributes:
        times: 2 for K Kᵀ; 1 for K, which is symmetric then.
        squared: Whether K Kᵀ is formed.
        size: Which power of K's size, ‖K‖_F / √d, is multiplied on.
    """

    times: int = 2
    squared: bool = False
    size: float = 0.0


@dataclass(frozen=True, eq=False)  # hashed by older compilers, half-built
class Preconditioner:
    """The factor K_n of one axis as it is multiplied onto gradients.

    Attributes:
        matrix: K_n K_nᵀ if it is formed, else K_n; in float16 divided by its magnitude.
        form: What is multiplied on.
        scale: What is multiplied on beside `matrix`, ``[rows]``; None: nothing.
    """

    matrix: StructuredMatrix
    form: Form
    scale: Tensor | None

    @property
    def is_copy(self) -> bool:
        """Whether there are numbers beside those of the factor itself."""
        return self._owns_matrix or self.scale is not None

    @property
    def _owns_matrix(self) -> bool:
        return self.form.squared or self.matrix.dtype == torch.float16

    @classmethod
    def prepare(cls, K: StructuredMatrix, form: Form) -> Self:
        """Bring the factor of an axis into a form."""
        scale = None
        if form.size:
            tiny = torch.finfo(torch.float32).tiny  # K is 0 until it starts
            scale = (K.norm() / max(K.dim, 1) ** 0.5).clamp(min=tiny) ** form.size
        if K.dtype == torch.float16:
            # the one type whose range K Kᵀ may leave; dividing costs a rounding
            top = K.max_abs().float().clamp(min=1.0)
            K, whole = K.scale(top.rsqrt()), top ** (form.times / 2)
            scale = whole if scale is None else whole * scale
        outer = K.outer() if form.squared else None
        if outer is None:
            form = Form(form.times, False, form.size)
        return cls(K if outer is None else outer, form, scale)

    @classmethod
    def allocate(cls, K: StructuredMatrix, form: Form) -> Self:
        """Return memory for what `prepare` returns, with any numbers."""
        kind: dict[str, Any] = {"dtype": K.dtype, "device": K.device}
        outer = K.outer_structure(K.dim, K.dtype) if form.squared else None
        scale = None
        if form.size or K.dtype == torch.float16:
            dtype = accumulation_dtype(K.dtype)
            scale = torch.empty(K.batch_shape, dtype=dtype, device=K.device)
        matrix = K
        if outer is not None:
            matrix = outer.zeros(K.dim, batch=tuple(K.batch_shape), **kind)
        elif K.dtype == torch.float16:
            matrix = K.map(torch.empty_like)
        return cls(matrix, Form(form.times, outer is not None, form.size), scale)

    def __call__(self, X: Tensor) -> Tensor:
        """Multiply onto X of shape ``[rows, d_n, columns]``, but for the scale."""
        if self.form.times == 1:
            return self.matrix.matmat(X)
        if self.form.squared:
            # K Kᵀ is its own transpose: take the one that needs no copy
            apply = self.matrix.rmatmat if is_column_major(X) else self.matrix.matmat
            return apply(X)
        return self.matrix.matmat(self.matrix.rmatmat(X))

    def __getitem__(self, rows: slice) -> Self:
        """Return a view of a run of rows."""
        scale = None if self.scale is None else self.scale[rows]
        return type(self)(self.matrix[rows], self.form, scale)

    def copy_(self, other: Self) -> None:
        """Copy the numbers of another one of the same form."""
        if self._owns_matrix:
            self.matrix.copy_(other.matrix)
        if self.scale is not None and other.scale is not None:
            self.scale.copy_(other.scale)


def precondition(factors: Sequence[Preconditioner], G: Tensor) -> Tensor:
    """Return U = G ×_1 P_1 ×_2 … ×_N P_N, with P_n = K_n K_nᵀ or what a form says.

    Args:
        factors: The pre-conditioner of each axis.
        G: Gradients, ``[rows, *dims]``.

    Returns:
        The pre-conditioned gradients, ``[rows, *dims]``, in G's type.
    """
    scales: list[Tensor] = []
    widen = any(factor.matrix.dtype == torch.float16 for factor in factors)

    def multiply(n: int, X: Tensor) -> Tensor:
        factor = factors[n]
        if factor.matrix.dtype == torch.float16:  # gradients of any size
            X, largest = normalized(X)
            scales.append(largest)
        if factor.scale is not None:
            scales.append(factor.scale)
        X = factor(X.to(factor.matrix.dtype))
        return X.to(accumulation_dtype(X.dtype)) if widen else X

    U = along_axes(G, multiply)
    if not widen:  # else one after the other: their product may leave the range
        scales = [reduce(torch.mul, scales)] if scales else []
    for scale in scales:
        U = U * per_matrix(scale, U)
    return U.to(G.dtype)
