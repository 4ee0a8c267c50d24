"""Diagonal matrices: one number a row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sirfshampoo.structures.base import StructuredMatrix, accumulation_dtype
from sirfshampoo.structures.products import is_column_major


@dataclass(frozen=True, eq=False)
class DiagonalMatrix(StructuredMatrix):
    """A batch of d × d diagonal matrices.

    Attributes:
        diag: The diagonal entries, ``[*batch, d]``.
    """

    HAS_SYMMETRIC = True

    diag: Tensor

    @property
    def dim(self) -> int:
        return self.diag.shape[-1]

    @classmethod
    def layout(cls, dim: int) -> dict[str, tuple[int, ...]]:
        return {"diag": (dim,)}

    def matmul(self, other: Self, *, scale: float = 1.0) -> Self:
        return type(self)(self.diag * (other.diag * scale))

    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return X * (self.diag * scale).unsqueeze(-1)

    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.matmat(X, scale=scale)

    @classmethod
    def project_gram(cls, X: Tensor, *, scale: float = 1.0) -> Self:
        dtype = accumulation_dtype(X.dtype)
        if is_column_major(X):
            sums = X.to(dtype).square().sum(-1)
        else:  # without a tensor of squares; across rows in memory it would be slow
            sums = torch.linalg.vector_norm(X, dim=-1, dtype=dtype).square()
        return cls(sums.mul_(scale).to(X.dtype))

    def gram(self, *, scale: float = 1.0) -> Self:
        return type(self)(self.diag * (self.diag * scale))

    def symmetrize_(self) -> Self:
        return self

    def outer(self) -> Self:
        return self.gram()

    def spectral_norm(self) -> Tensor:
        """Return the largest magnitude, ``[*batch]``."""
        return self.max_abs().to(accumulation_dtype(self.dtype))

    def diagonals(self) -> tuple[Tensor, ...]:
        return (self.diag,)

    @classmethod
    def from_dense(cls, S: Tensor) -> Self:
        return cls(S.diagonal(dim1=-2, dim2=-1).clone())

    def to_dense(self) -> Tensor:
        return self.diag.diag_embed()
