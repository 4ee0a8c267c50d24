"""Hierarchical matrices: dense first and last rows, a diagonal between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sirfshampoo.structures.base import StructuredMatrix, accumulation_dtype
from sirfshampoo.structures.products import is_column_major, product, product_like


@dataclass(frozen=True, eq=False)
class HierarchicalMatrix(StructuredMatrix):
    """A batch of matrices [[A, B₁, B₂], [0, diag(c), 0], [0, D, E]].

    A has a = min(d, TOP) rows, E has e = min(d − a, BOTTOM), and c what is left.

    Attributes:
        TOP: The largest number of rows of A.
        BOTTOM: The largest number of rows of E.
        dense: The rows [A, B₁, B₂] above the rows [0, D, E], ``[*batch, a + e, d]``.
            The zeros are stored, too: with them, each product is a single one.
        middle: The diagonal c, ``[*batch, d − a − e]``.
    """

    TOP: ClassVar[int]
    BOTTOM: ClassVar[int]

    dense: Tensor
    middle: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make the matrix anew, for pickle and deepcopy."""
        # pickle does not find a class that is made when its sizes are asked for
        return _rebuilt, (self.TOP, self.BOTTOM, self.tensors())

    @property
    def dim(self) -> int:
        return self.dense.shape[-1]

    @classmethod
    def _sizes(cls, dim: int) -> tuple[int, int, int]:
        """Return the number of rows of the three parts: a, d − a − e, e."""
        a = min(dim, cls.TOP)
        e = min(dim - a, cls.BOTTOM)
        return a, dim - a - e, e

    @classmethod
    def layout(cls, dim: int) -> dict[str, tuple[int, ...]]:
        a, mid, e = cls._sizes(dim)
        return {"dense": (a + e, dim), "middle": (mid,)}

    @classmethod
    def _outer_rows(cls, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return the first a and last e rows of X in one tensor, and those between."""
        a, mid, e = cls._sizes(X.shape[-2])
        first, between, last = X.split([a, mid, e], dim=-2)
        if is_column_major(X):
            return torch.cat([first.mT, last.mT], dim=-1).mT, between
        return torch.cat([first, last], dim=-2), between

    def matmul(self, other: Self, *, scale: float = 1.0) -> Self:
        # the dense rows of K L, from those of K: (Lᵀ denseᵀ)ᵀ
        dense = other.rmatmat(self.dense.mT, scale=scale).mT.contiguous()
        return type(self)(dense, self.middle * (other.middle * scale))

    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        a, mid, e = self._sizes(self.dim)
        Y = torch.empty_like(X)
        first, between, last = Y.split([a, mid, e], dim=-2)
        dense = product_like(self.dense, X, scale)
        first.copy_(dense[..., :a, :])
        last.copy_(dense[..., a:, :])
        c = (self.middle * scale).unsqueeze(-1)
        if torch.compiler.is_compiling():  # Dynamo takes no scattered `out=`
            between.copy_(X[..., a : a + mid, :] * c)
        else:
            torch.mul(X[..., a : a + mid, :], c, out=between)
        return Y

    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        a, mid, _ = self._sizes(self.dim)
        rows, between = self._outer_rows(X)
        Y = product_like(self.dense.mT, rows, scale)
        c = (self.middle * scale).unsqueeze(-1)
        Y[..., a : a + mid, :].addcmul_(between, c)
        return Y

    @classmethod
    def project_gram(cls, X: Tensor, *, scale: float = 1.0) -> Self:
        rows, between = cls._outer_rows(X)
        squares = between.to(accumulation_dtype(X.dtype)).square().sum(-1)
        return cls._project(product(rows, X.mT, scale), squares.mul_(scale).to(X.dtype))

    def gram(self, *, scale: float = 1.0) -> Self:
        # a middle row of K has a single entry: it reaches the diagonal only
        columns, between = self._outer_rows(self.dense.mT)
        middle = self.middle.square().add_(between.square().sum(-1))
        return self._project(product(columns, self.dense, scale), middle.mul_(scale))

    @classmethod
    def _project(cls, rows: Tensor, middle: Tensor) -> Self:
        """Return Π(S) from rows of S, which are overwritten, and its diagonal."""
        d = rows.shape[-1]
        a, mid, _ = cls._sizes(d)
        rows[..., a:, :a].zero_()
        # B and D count twice: their mirror images in S are not stored
        rows[..., :a, a:].mul_(2)
        rows[..., a:, a : a + mid].mul_(2)
        return cls(rows, middle)

    @classmethod
    def outer_structure(cls, dim: int, dtype: torch.dtype) -> None:
        return None

    def outer(self) -> None:
        return None

    def diagonals(self) -> tuple[Tensor, ...]:
        a, mid, _ = self._sizes(self.dim)
        A, E = self.dense[..., :a, :a], self.dense[..., a:, a + mid :]
        return A.diagonal(dim1=-2, dim2=-1), self.middle, E.diagonal(dim1=-2, dim2=-1)

    @classmethod
    def from_dense(cls, S: Tensor) -> Self:
        a, mid, _ = cls._sizes(S.shape[-1])
        diagonal = S.diagonal(dim1=-2, dim2=-1)[..., a : a + mid]
        return cls._project(cls._outer_rows(S)[0], diagonal.clone())

    def to_dense(self) -> Tensor:
        a, mid, _ = self._sizes(self.dim)
        K = self.dense.new_zeros(self.shape)
        K[..., :a, :] = self.dense[..., :a, :]
        K.diagonal(dim1=-2, dim2=-1)[..., a : a + mid] = self.middle
        K[..., a + mid :, :] = self.dense[..., a:, :]
        return K


@cache
def hierarchical(top: int, bottom: int) -> type[HierarchicalMatrix]:
    """Return the one class of hierarchical matrices with so many dense rows."""
    doc = f"Hierarchical matrices with {top} first and {bottom} last rows."
    members = {"TOP": top, "BOTTOM": bottom, "__doc__": doc, "__module__": __name__}
    cls = type(f"Hierarchical{top}_{bottom}Matrix", (HierarchicalMatrix,), members)
    return dataclass(frozen=True, eq=False)(cls)


def _rebuilt(top: int, bottom: int, tensors: tuple[Tensor, ...]) -> HierarchicalMatrix:
    """Return a matrix from what pickle kept of it."""
    return hierarchical(top, bottom)(*tensors)


Hierarchical15_15Matrix = hierarchical(15, 15)
