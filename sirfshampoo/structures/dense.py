"""Dense matrices: every entry is free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sirfshampoo.structures.base import (
    StructuredMatrix,
    accumulation_dtype,
    per_matrix,
)
from sirfshampoo.structures.products import (
    is_widened,
    product,
    product_like,
    sum_of_symmetric_products,
    symmetric_product,
)


@dataclass(frozen=True, eq=False)
class DenseMatrix(StructuredMatrix):
    """A batch of d × d matrices without structure.

    Attributes:
        mat: The entries, ``[*batch, d, d]``.
    """

    HAS_SYMMETRIC = True

    mat: Tensor

    @property
    def dim(self) -> int:
        return self.mat.shape[-1]

    @classmethod
    def layout(cls, dim: int) -> dict[str, tuple[int, ...]]:
        return {"mat": (dim, dim)}

    def matmul(self, other: Self, *, scale: float = 1.0) -> Self:
        return type(self)(product(self.mat, other.mat, scale))

    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return product_like(self.mat, X, scale)

    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return product_like(self.mat.mT, X, scale)

    @classmethod
    def project_gram(cls, X: Tensor, *, scale: float = 1.0) -> Self:
        return cls(symmetric_product(X, scale))

    def gram(self, *, scale: float = 1.0) -> Self:
        return type(self)(symmetric_product(self.mat.mT, scale))

    def outer(self) -> Self:
        return type(self)(symmetric_product(self.mat))

    def damped_gram(
        self,
        X: Tensor,
        *,
        scale: float,
        damping: float | Tensor,
        out: Self | None = None,
    ) -> Self:
        K = self.mat
        if isinstance(damping, Tensor):
            K, damping = (K * per_matrix(damping.sqrt(), K)).to(K.dtype), 1.0
        terms = (K.mT, damping), (X, scale)
        S = None if out is None else out.mat
        return type(self)(sum_of_symmetric_products(*terms, out=S))

    def _adds_products(self) -> bool:
        """Return whether a product is added to what is there in one call."""
        return self.mat.ndim == 3 and not is_widened(self.mat)

    def add_product_(
        self, other: Self, alpha: float | Tensor, *, scratch: Self | None = None
    ) -> Self:
        if not self._adds_products() or isinstance(alpha, Tensor):
            return super().add_product_(other, alpha)
        # with K in a second place, its product is added within the matrix product
        K = self.mat.clone() if scratch is None else scratch.mat.copy_(self.mat)
        self.mat.baddbmm_(K, other.mat, alpha=alpha)
        return self

    def transform_(
        self, other: Self, alpha: float | Tensor, *, scratch: Self | None = None
    ) -> Self:
        if isinstance(alpha, Tensor):
            other, alpha = other.scale(alpha), 1.0
        if not self._adds_products() or alpha == 0.0:  # see `product`
            return super().transform_(other, alpha)
        K, L = self.mat, other.mat
        spare = torch.empty_like(K) if scratch is None else scratch.mat
        K.baddbmm_(spare.copy_(K), L, alpha=alpha)
        torch.baddbmm(K, L, K, alpha=alpha, out=spare)
        torch.lerp(spare, spare.mT, 0.5, out=K)
        return self

    def symmetrize_(self) -> Self:
        self.mat.add_(self.mat.mT.clone()).mul_(0.5)
        return self

    def column(self, index: Tensor) -> Tensor:
        where = index[..., None, None].expand(*self.mat.shape[:-1], 1)
        return self.mat.gather(-1, where)

    def probe(self) -> Tensor:
        # a Gram matrix with a finite diagonal is finite
        (diagonal,) = self.diagonals()
        return diagonal.sum(-1, dtype=accumulation_dtype(self.dtype))

    def diagonals(self) -> tuple[Tensor, ...]:
        return (self.mat.diagonal(dim1=-2, dim2=-1),)

    @classmethod
    def from_dense(cls, S: Tensor) -> Self:
        return cls(S.clone())

    def to_dense(self) -> Tensor:
        return self.mat.clone()
