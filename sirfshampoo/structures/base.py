"""The algebra of batched structured matrices: few primitives, the rest derived."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from math import prod
from typing import ClassVar, Self

import torch
from torch import Size, Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums over `dtype` are taken: at least float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def per_matrix(value: Tensor, tensor: Tensor) -> Tensor:
    """Reshape one value a matrix, ``[*batch]``, to broadcast over a field."""
    return value.reshape(value.shape + (1,) * (tensor.ndim - value.ndim))


@cache
def _core_ndim(structure: type[StructuredMatrix]) -> int:
    """Return how many axes the first field of a structure has for one matrix."""
    return len(next(iter(structure.layout(0).values())))


@dataclass(frozen=True, eq=False)
class StructuredMatrix(ABC):
    """A batch of square matrices K of one structure; the fields are its tensors.

    Every field has the same leading batch axes. A structure is closed under product
    and sum, and comes with the projection Π of symmetric matrices of Figure 5 of
    Structured Inverse-Free Natural Gradient (arXiv 2312.05705).

    A subclass defines the abstract methods below. `from_dense` and `to_dense` are
    the structure's executable definition; the engine calls neither.

    Attributes:
        WORKSPACE: How many numbers a product K X needs for each number of X.
        HAS_SYMMETRIC: Whether Kᵀ has the structure of K; only then can K be symmetric.
    """

    WORKSPACE: ClassVar[int] = 1
    HAS_SYMMETRIC: ClassVar[bool] = False

    # ---------------------------------------------------------------- primitives

    @property
    @abstractmethod
    def dim(self) -> int:
        """Number of rows (and columns) d."""

    @classmethod
    @abstractmethod
    def layout(cls, dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of each field, without batch axes, of a d × d matrix."""

    @abstractmethod
    def matmul(self, other: Self, *, scale: float = 1.0) -> Self:
        """Return ``scale`` · K L for another matrix L of the same structure."""

    @abstractmethod
    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return ``scale`` · K X for X of shape ``[*batch, d, c]``."""

    @abstractmethod
    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return ``scale`` · Kᵀ X for X of shape ``[*batch, d, c]``."""

    @classmethod
    @abstractmethod
    def project_gram(cls, X: Tensor, *, scale: float = 1.0) -> Self:
        """Return ``scale`` · Π(X Xᵀ) for X of shape ``[*batch, d, c]``."""

    @abstractmethod
    def gram(self, *, scale: float = 1.0) -> Self:
        """Return ``scale`` · Π(Kᵀ K)."""

    @abstractmethod
    def outer(self) -> StructuredMatrix | None:
        """Return K Kᵀ, or None if `outer_structure` has none for it."""

    @abstractmethod
    def diagonals(self) -> tuple[Tensor, ...]:
        """Return writable views that together hold every diagonal entry once."""

    @classmethod
    @abstractmethod
    def from_dense(cls, S: Tensor) -> Self:
        """Return Π(S) for a symmetric S of shape ``[*batch, d, d]``."""

    @abstractmethod
    def to_dense(self) -> Tensor:
        """Return K as a tensor of shape ``[*batch, d, d]``."""

    def multiplicity(self) -> tuple[Tensor | None, ...]:
        """Return, a field, how often each number stands in K; None: once each."""
        return (None,) * len(self.tensors())

    def symmetrize_(self) -> Self:
        """Replace K by ½ (K + Kᵀ) in place; only where `HAS_SYMMETRIC` holds."""
        raise NotImplementedError(f"{type(self).__name__} is not closed under Kᵀ.")

    @classmethod
    def outer_structure(
        cls, dim: int, dtype: torch.dtype
    ) -> type[StructuredMatrix] | None:
        """Return the structure of K Kᵀ, or None if no step should form that product.

        It is that of K, unless K's structure is not closed under transposition.
        """
        return cls

    # ------------------------------------------------------------------- fields

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the tensor of every field."""
        yield from vars(self).items()  # a dataclass sets its fields, in their order

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of all fields."""
        # not `vars`, which older compilers cannot trace
        names: tuple[str, ...] = self.__match_args__
        return tuple([getattr(self, name) for name in names])

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return the matrix whose fields are `function` of this one's fields."""
        return type(self)(*map(function, self.tensors()))

    def __getitem__(self, index: int | slice) -> Self:
        """Return a view of one matrix, or a run of them, along the first batch axis."""
        return self.map(lambda t: t[index])

    @property
    def dtype(self) -> torch.dtype:
        """The data type of the fields."""
        return self.tensors()[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the fields."""
        return self.tensors()[0].device

    @property
    def batch_ndim(self) -> int:
        """The number of leading batch axes."""
        return self.tensors()[0].ndim - _core_ndim(type(self))

    @property
    def batch_shape(self) -> Size:
        """The leading batch axes."""
        return self.tensors()[0].shape[: self.batch_ndim]

    @property
    def shape(self) -> Size:
        """The shape of the dense equivalent, ``[*batch, d, d]``."""
        return Size((*self.batch_shape, self.dim, self.dim))

    @classmethod
    def num_stored(cls, dim: int) -> int:
        """Return how many numbers one d × d matrix of this structure stores."""
        return sum(map(prod, cls.layout(dim).values()))

    @classmethod
    def flops(cls, dim: int, columns: int, dtype: torch.dtype = torch.float32) -> int:
        """Return about how many floating-point operations K X takes.

        Args:
            dim: The number of rows d of K.
            columns: The number of columns of X.
            dtype: The data type of K.

        Returns:
            The number of operations; a multiplication with an addition counts two.
        """
        return 2 * cls.num_stored(dim) * columns

    # ------------------------------------------------------------- construction

    @classmethod
    def zeros(
        cls,
        dim: int,
        *,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a batch of d × d zero matrices."""
        shapes = cls.layout(dim).values()
        return cls(
            *(torch.zeros(*batch, *s, dtype=dtype, device=device) for s in shapes)
        )

    @classmethod
    def eye(
        cls,
        dim: int,
        *,
        batch: tuple[int, ...] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Return a batch of d × d identity matrices."""
        return cls.zeros(dim, batch=batch, dtype=dtype, device=device).shift_(1.0)

    # ------------------------------------------------------------------ algebra

    def scale(self, alpha: float | Tensor) -> Self:
        """Return ``alpha`` · K; a tensor ``alpha`` holds one value a matrix."""
        if isinstance(alpha, Tensor):
            return self.map(lambda t: (t * per_matrix(alpha, t)).to(t.dtype))
        return self.map(lambda t: t * alpha)

    def shift_(self, alpha: float | Tensor) -> Self:
        """Add ``alpha`` · I in place; a tensor ``alpha`` holds one value a matrix."""
        for diagonal in self.diagonals():
            if isinstance(alpha, Tensor):
                diagonal.add_(per_matrix(alpha, diagonal))
            else:
                diagonal.add_(alpha)
        return self

    def add_(self, other: Self, alpha: float | Tensor = 1.0) -> Self:
        """Add ``alpha`` · other in place; a tensor ``alpha`` has one value a matrix."""
        for t, o in zip(self.tensors(), other.tensors(), strict=True):
            if isinstance(alpha, Tensor):
                t.addcmul_(o, per_matrix(alpha, t))
            else:
                t.add_(o, alpha=alpha)
        return self

    def lerp_(self, other: Self, weight: float | Tensor) -> Self:
        """Move in place to (1 − weight) · K + weight · other."""
        for t, o in zip(self.tensors(), other.tensors(), strict=True):
            if isinstance(weight, Tensor):
                t.lerp_(o, per_matrix(weight, t).to(t.dtype))
            else:
                t.lerp_(o, weight)
        return self

    def copy_(self, other: Self) -> Self:
        """Copy the numbers of another matrix of the same layout into this one."""
        for t, o in zip(self.tensors(), other.tensors(), strict=True):
            t.copy_(o)
        return self

    def clear_(self, where: Tensor) -> Self:
        """Set the matrices for which the ``[*batch]`` mask holds to zero, in place."""
        for t in self.tensors():
            t.masked_fill_(per_matrix(where, t), 0.0)
        return self

    # -------------------------------------------------- algebra that can be fused

    def damped_gram(
        self,
        X: Tensor,
        *,
        scale: float,
        damping: float | Tensor,
        out: Self | None = None,
    ) -> Self:
        """Return ``scale`` · Π(X Xᵀ) + ``damping`` · Π(Kᵀ K).

        A tensor ``damping`` has one value a matrix. The result may lie in `out`.
        """
        # Kᵀ K / d stays in the range of half precision
        gram = self.gram(scale=1 / max(self.dim, 1))
        return self.project_gram(X, scale=scale).add_(gram, damping * self.dim)

    def add_product_(
        self, other: Self, alpha: float | Tensor, *, scratch: Self | None = None
    ) -> Self:
        """Add ``alpha`` · K L in place; a tensor ``alpha`` has one value a matrix.

        The numbers in `scratch` may be overwritten.
        """
        if isinstance(alpha, Tensor):
            return self.add_(self.matmul(other.scale(alpha)))
        return self.add_(self.matmul(other, scale=alpha))

    def transform_(
        self, other: Self, alpha: float | Tensor, *, scratch: Self | None = None
    ) -> Self:
        """Replace K by (I + ``alpha`` · L) K (I + ``alpha`` · L); both are symmetric.

        If K is positive definite, it stays so, unless −1 is an eigenvalue of ``alpha``
        · L. A tensor ``alpha`` has one value a matrix. The numbers in `scratch` may be
        overwritten.
        """
        self.add_product_(other, alpha, scratch=scratch)
        return self.add_(other.scale(alpha).matmul(self)).symmetrize_()

    # --------------------------------------------------------------- reductions

    def norm(self) -> Tensor:
        """Return the Frobenius norm of the dense equivalent, ``[*batch]``."""
        dtype = accumulation_dtype(self.dtype)
        norms: list[Tensor] = []
        for t, times in zip(self.tensors(), self.multiplicity(), strict=True):
            entries = t if times is None else t.to(dtype) * times.to(dtype).sqrt()
            rows = t.ndim - self.batch_ndim > 1
            if rows and t.dtype == torch.bfloat16 and t.device.type == "cpu":
                # else it would be copied whole; within rows, torch sums in float32, too
                entries = torch.linalg.vector_norm(entries, dim=-1)
            axes = tuple(range(self.batch_ndim, entries.ndim))
            norms.append(torch.linalg.vector_norm(entries, dim=axes, dtype=dtype))
        return reduce(torch.hypot, norms)

    def spectral_norm(self) -> Tensor:
        """Return about the spectral norm, at most that, ``[*batch]``.

        By two rounds of the power method for Kᵀ K, from the axis that the largest entry
        of the diagonal belongs to.
        """
        dtype, d = accumulation_dtype(self.dtype), self.dim
        if d == 0:
            return torch.zeros(self.batch_shape, dtype=dtype, device=self.device)
        tiny = torch.finfo(dtype).tiny
        diagonals = [t.flatten(self.batch_ndim) for t in self.diagonals()]
        diagonal = diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals, -1)
        # K / √d stays in the range of half precision, and its square in that of others
        root = d**0.5
        v = self.column(diagonal.abs().argmax(-1)).to(dtype) / root
        norm = torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_(min=tiny)
        for multiply in (self.rmatmat, self.matmat, self.rmatmat):
            # each time, since products of several leave any range when gradients jump
            v = multiply((v / norm).to(self.dtype), scale=1 / root).to(dtype)
            # they only grow: one that has left the range tells, v is 0 from there on
            norm = norm.fmax(torch.linalg.vector_norm(v, dim=-2, keepdim=True))
        estimate: Tensor = norm[..., 0, 0] * root
        return estimate

    def column(self, index: Tensor) -> Tensor:
        """Return a column of each matrix, ``[*batch, d, 1]``, by its index."""
        axis = torch.zeros(*self.shape[:-1], 1, dtype=self.dtype, device=self.device)
        return self.matmat(axis.scatter_(-2, index[..., None, None], 1.0))

    def probe(self) -> Tensor:
        """Return numbers ``[*batch]`` that are finite only if all entries are."""
        dtype = accumulation_dtype(self.dtype)
        flat = [t.flatten(self.batch_ndim) for t in self.tensors()]
        # an entry that is not finite makes the sum so
        return reduce(torch.add, [t.sum(-1, dtype=dtype) for t in flat])

    def max_abs(self) -> Tensor:
        """Return the largest magnitude among the entries, ``[*batch]`` (0 if d = 0)."""
        flat = [t.flatten(self.batch_ndim) for t in self.tensors()]
        tops = [t.abs().amax(-1) for t in flat if t.shape[-1] > 0]
        if not tops:
            return torch.zeros(self.batch_shape, dtype=self.dtype, device=self.device)
        return torch.stack(tops).amax(0)
