"""Block-diagonal matrices: dense blocks of one size, then a smaller one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sirfshampoo.structures.base import StructuredMatrix
from sirfshampoo.structures.dense import DenseMatrix
from sirfshampoo.structures.products import is_widened, product, product_like


@dataclass(frozen=True, eq=False)
class BlockDiagonalMatrix(StructuredMatrix):
    """A batch of matrices with ⌊d / b⌋ dense b × b blocks and one of the rest.

    Attributes:
        BLOCK_SIZE: The size b of the blocks.
        blocks: The blocks of full size, ``[*batch, d // b, b, b]``.
        last: The block of the remaining rows, ``[*batch, d % b, d % b]``.
    """

    BLOCK_SIZE: ClassVar[int]
    HAS_SYMMETRIC = True

    blocks: Tensor
    last: Tensor

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make the matrix anew, for pickle and deepcopy."""
        # pickle does not find a class that is made when its size is asked for
        return _rebuilt, (self.BLOCK_SIZE, self.tensors())

    @property
    def dim(self) -> int:
        return self.blocks.shape[-3] * self.BLOCK_SIZE + self.last.shape[-1]

    @classmethod
    def layout(cls, dim: int) -> dict[str, tuple[int, ...]]:
        number, rest = divmod(dim, cls.BLOCK_SIZE)
        size = cls.BLOCK_SIZE
        return {"blocks": (number, size, size), "last": (rest, rest)}

    @classmethod
    def _cut(cls, X: Tensor) -> tuple[Tensor, Tensor]:
        """Split the rows of X into [*batch, d // b, b, c] and [*batch, d % b, c]."""
        number, rest = divmod(X.shape[-2], cls.BLOCK_SIZE)
        head, last = X.split([X.shape[-2] - rest, rest], dim=-2)
        return head.unflatten(-2, (number, cls.BLOCK_SIZE)), last

    def _parts(self) -> tuple[DenseMatrix, ...]:
        """Return views of the blocks, ``[number, b, b]``, and of the last ones.

        Without those of size 0.
        """
        found = [t.view(-1, *t.shape[-2:]) for t in self.tensors() if t.numel()]
        return tuple(map(DenseMatrix, found))

    def _matched(
        self, other: Self, alpha: float | Tensor
    ) -> Iterator[tuple[DenseMatrix, DenseMatrix, float | Tensor]]:
        """Yield the parts of both, with alpha repeated for all blocks of its matrix."""
        for K, L in zip(self._parts(), other._parts(), strict=True):
            if isinstance(alpha, Tensor):
                repeats = len(K.mat) // alpha.numel()
                yield K, L, alpha.flatten().repeat_interleave(repeats)
            else:
                yield K, L, alpha

    def matmul(self, other: Self, *, scale: float = 1.0) -> Self:
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return type(self)(*(product(t, o, scale) for t, o in pairs))

    @classmethod
    def _is_even(cls, X: Tensor) -> bool:
        """Return whether the blocks of X lie at even distances in memory."""
        return X.shape[-2] % cls.BLOCK_SIZE == 0 and X.is_contiguous()

    @classmethod
    def _goes_in_turn(cls, X: Tensor) -> bool:
        """Return whether products with X go one by one over the batch.

        Where blocks lie at uneven distances, one product for all needs copies of X;
        beyond some size these cost more than the products' launches.
        """
        is_large = X.ndim == 3 and X.shape[1:].numel() >= 1 << 14
        return is_large and not cls._is_even(X)

    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        if self._is_even(X):
            head, _ = self._cut(X)
            return product(self.blocks, head, scale).flatten(-3, -2)
        Y = torch.empty_like(X)
        if self._goes_in_turn(X):
            for K_i, X_i, Y_i in zip(self._single(), X, Y, strict=True):
                K_i._multiply_into(X_i, Y_i, scale)
        else:
            self._multiply_into(X, Y, scale)
        return Y

    def _single(self) -> Iterator[Self]:
        """Yield views of the matrices of a batch."""
        for blocks, last in zip(self.blocks, self.last, strict=True):
            yield type(self)(blocks, last)

    def _multiply_into(self, X: Tensor, Y: Tensor, scale: float) -> None:
        """Set Y to ``scale`` · K X."""
        parts = zip(self.tensors(), self._cut(X), self._cut(Y), strict=True)
        for K, x, y in parts:
            fills = x.ndim == 3 and y.is_contiguous() and not is_widened(K)
            if fills and scale != 0.0:
                torch.baddbmm(y, K, x, beta=0.0, alpha=scale, out=y)
            else:
                y.copy_(product_like(K, x, scale))

    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return type(self)(self.blocks.mT, self.last.mT).matmat(X, scale=scale)

    @classmethod
    def project_gram(cls, X: Tensor, *, scale: float = 1.0) -> Self:
        head, last = cls._cut(X)
        if cls._goes_in_turn(X):
            blocks = torch.stack([product(part, part.mT, scale) for part in head])
        else:
            blocks = product(head, head.mT, scale)
        return cls(blocks, product(last, last.mT, scale))

    def gram(self, *, scale: float = 1.0) -> Self:
        return self.map(lambda t: product(t.mT, t, scale))

    def outer(self) -> Self:
        return self.map(lambda t: product(t, t.mT))

    def add_product_(
        self, other: Self, alpha: float | Tensor, *, scratch: Self | None = None
    ) -> Self:
        for K, L, a in self._matched(other, alpha):
            K.add_product_(L, a)
        return self

    def transform_(
        self, other: Self, alpha: float | Tensor, *, scratch: Self | None = None
    ) -> Self:
        for K, L, a in self._matched(other, alpha):
            K.transform_(L, a)
        return self

    def symmetrize_(self) -> Self:
        for K in self._parts():
            K.symmetrize_()
        return self

    def spectral_norm(self) -> Tensor:
        """Return about the largest of the blocks' spectral norms, ``[*batch]``."""
        number = self.batch_shape.numel()
        norms = [K.spectral_norm().view(number, -1) for K in self._parts()]
        if not norms:
            return super().spectral_norm()
        return torch.cat(norms, -1).amax(-1).view(self.batch_shape)

    def diagonals(self) -> tuple[Tensor, ...]:
        return tuple(t.diagonal(dim1=-2, dim2=-1) for t in self.tensors())

    @classmethod
    def from_dense(cls, S: Tensor) -> Self:
        number, rest = divmod(S.shape[-1], cls.BLOCK_SIZE)
        full, size = S.shape[-1] - rest, cls.BLOCK_SIZE
        tiles = S[..., :full, :full].unflatten(-1, (number, size))
        tiles = tiles.unflatten(-3, (number, size))  # [*batch, n, b, n, b]
        blocks = tiles.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
        return cls(blocks.clone(), S[..., full:, full:].clone())

    def to_dense(self) -> Tensor:
        size, full = self.BLOCK_SIZE, self.blocks.shape[-3] * self.BLOCK_SIZE
        K = self.last.new_zeros(self.shape)
        for i, start in enumerate(range(0, full, size)):
            stop = start + size
            K[..., start:stop, start:stop] = self.blocks[..., i, :, :]
        K[..., full:, full:] = self.last
        return K


@cache
def block_diagonal(size: int) -> type[BlockDiagonalMatrix]:
    """Return the one class of block-diagonal matrices with blocks of a size."""
    doc = f"Block-diagonal matrices with blocks of {size} × {size}."
    members = {"BLOCK_SIZE": size, "__doc__": doc, "__module__": __name__}
    cls = type(f"Block{size}DiagonalMatrix", (BlockDiagonalMatrix,), members)
    return dataclass(frozen=True, eq=False)(cls)


def _rebuilt(size: int, tensors: tuple[Tensor, ...]) -> BlockDiagonalMatrix:
    """Return a matrix from what pickle kept of it."""
    return block_diagonal(size)(*tensors)


Block30DiagonalMatrix = block_diagonal(30)
