"""Triangular Toeplitz matrices: one number a diagonal, large products by FFT."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, log2
from typing import Self

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from sirfshampoo.structures.base import StructuredMatrix, accumulation_dtype
from sirfshampoo.structures.dense import DenseMatrix
from sirfshampoo.structures.products import product_like


@lru_cache(maxsize=1024)
def _fft_length(dim: int) -> int:
    """Return the least 2ⁱ·3ʲ·5ᵏ that holds a convolution of two vectors of length d."""
    least = max(2 * dim - 1, 1)
    best = 1 << (least - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            length = three << max(-(-least // three) - 1, 0).bit_length()
            best = min(best, length)
            three *= 3
        five *= 5
    return best


#: Up to which size products gather the whole matrix, by the bytes of a number; larger
#: ones go by FFT, and so do those with too few columns to repay the gathering.
#: Measured on a CPU.
_GATHERED_UP_TO = {2: 512, 4: 256, 8: 128}
_FEWEST_COLUMNS = 16


def _is_gathered(dim: int, dtype: torch.dtype) -> bool:
    """Return whether products with many columns multiply the gathered matrix."""
    return dim <= _GATHERED_UP_TO[dtype.itemsize]


def _padded(x: Tensor) -> Tensor:
    """Return signals ``[*batch, d]`` with zeros behind, contiguous, float32 at least.

    Left to `rfft`, padding costs several times the transform if the signals do not lie
    contiguous in memory.
    """
    d = x.shape[-1]
    dtype = accumulation_dtype(x.dtype)
    padded = torch.empty(*x.shape[:-1], _fft_length(d), dtype=dtype, device=x.device)
    padded[..., :d] = x
    padded[..., d:].zero_()
    return padded


def _spectrum(x: Tensor) -> Tensor:
    """Return the spectrum of signals that `_padded` made."""
    spectrum: Tensor = rfft(x)
    return spectrum


def _signal(spectrum: Tensor, d: int) -> Tensor:
    """Return the first d entries of the signals of a spectrum."""
    signal: Tensor = irfft(spectrum, n=_fft_length(d))
    return signal[..., :d]


@dataclass(frozen=True, eq=False)
class ToeplitzMatrix(StructuredMatrix):
    """A batch of triangular Toeplitz matrices; both triangles share this algebra.

    Attributes:
        coeffs: The number k_j on the j-th diagonal off the main one, ``[*batch, d]``.
    """

    # padded columns, their spectrum and the products: twice d each, or a little more
    WORKSPACE = 6

    coeffs: Tensor

    @property
    def dim(self) -> int:
        return self.coeffs.shape[-1]

    @classmethod
    def layout(cls, dim: int) -> dict[str, tuple[int, ...]]:
        return {"coeffs": (dim,)}

    @classmethod
    def flops(cls, dim: int, columns: int, dtype: torch.dtype = torch.float32) -> int:
        if _is_gathered(dim, dtype) and columns >= _FEWEST_COLUMNS:
            return DenseMatrix.flops(dim, columns)
        n = _fft_length(dim)
        transform = ceil(2.5 * n * log2(n))  # of n real numbers
        product = 6 * (n // 2 + 1) + 2 * dim  # of spectra; of the main diagonal
        return transform + columns * (2 * transform + product) if columns else 0

    @staticmethod
    def _lengths(d: int, like: Tensor) -> Tensor:
        """Return the lengths of the diagonals: d, d − 1, …, 1."""
        dtype = accumulation_dtype(like.dtype)
        return torch.arange(d, 0, -1, dtype=dtype, device=like.device)

    @classmethod
    def _project(cls, sums: Tensor, scale: float) -> Tensor:
        """Return Π(S) from the sums over the diagonals of a symmetric S."""
        weights = (2 * scale) / cls._lengths(sums.shape[-1], sums)
        weights[:1] /= 2  # the main diagonal has no mirror image
        return sums * weights

    def _multiply(self, X: Tensor, scale: float, *, transposed: bool) -> Tensor:
        """Convolve (lower triangle) or correlate (upper) the rows of X with k."""
        d = self.dim
        if X.numel() == 0:
            return X.clone()
        if _is_gathered(d, self.dtype) and X.shape[-1] >= _FEWEST_COLUMNS:
            upper = self._gathered_upper()
            return product_like(upper if transposed else upper.mT, X, scale)
        k = _padded(self.coeffs * scale).unsqueeze(-2)  # [*batch, 1, n]
        diagonal = k[..., :1].clone()
        k[..., 0].zero_()
        spectrum = _spectrum(k)
        if transposed:
            spectrum = spectrum.conj()
        columns = _padded(X.mT)  # [*batch, c, n]
        Y = _signal(_spectrum(columns).mul_(spectrum), d)
        # the main diagonal needs no transform; left out of it, the identity is exact
        return Y.addcmul_(columns[..., :d], diagonal).mT.to(X.dtype)

    def matmul(self, other: Self, *, scale: float = 1.0) -> Self:
        if self.coeffs.numel() == 0:
            return type(self)(self.coeffs.clone())
        spectrum = _spectrum(_padded(self.coeffs)) * _spectrum(_padded(other.coeffs))
        product = _signal(spectrum, self.dim) * scale
        return type(self)(product.to(self.dtype))

    @classmethod
    def project_gram(cls, X: Tensor, *, scale: float = 1.0) -> Self:
        if X.numel() == 0:
            return cls(X.new_zeros(X.shape[:-1]))
        # the sums over the diagonals of X Xᵀ are the autocorrelation of its columns
        spectrum = torch.view_as_real(_spectrum(_padded(X.mT)))
        power = spectrum.square_().sum(-3).sum(-1)
        sums = _signal(torch.complex(power, torch.zeros_like(power)), X.shape[-2])
        return cls(cls._project(sums, scale).to(X.dtype))

    def gram(self, *, scale: float = 1.0) -> Self:
        # Σ_a k_a (d − (a + j)) k_{a+j}: k correlated with its length-weighted self
        d, k = self.dim, self.coeffs
        if k.numel() == 0:
            return type(self)(k.clone())
        spectrum = _spectrum(_padded(k * self._lengths(d, k)))
        spectrum = spectrum.mul_(_spectrum(_padded(k)).conj())
        return type(self)(self._project(_signal(spectrum, d), scale).to(k.dtype))

    @classmethod
    def outer_structure(cls, dim: int, dtype: torch.dtype) -> type[DenseMatrix] | None:
        return DenseMatrix if _is_gathered(dim, dtype) else None

    def outer(self) -> DenseMatrix | None:
        if not _is_gathered(self.dim, self.dtype):
            return None
        return DenseMatrix(self.to_dense()).outer()

    def diagonals(self) -> tuple[Tensor, ...]:
        return (self.coeffs[..., :1],)

    def multiplicity(self) -> tuple[Tensor | None, ...]:
        return (self._lengths(self.dim, self.coeffs),)

    @classmethod
    def from_dense(cls, S: Tensor) -> Self:
        d = S.shape[-1]
        sums = [S.diagonal(offset=j, dim1=-2, dim2=-1).sum(-1) for j in range(d)]
        stacked = torch.stack(sums, dim=-1) if sums else S.new_zeros(S.shape[:-1])
        return cls(cls._project(stacked, 1.0).to(S.dtype))

    def _gathered_upper(self) -> Tensor:
        """Return the upper triangular matrix of these coefficients."""
        # row i: i zeros, then the first d − i coefficients
        rows = torch.nn.functional.pad(self.coeffs, (max(self.dim - 1, 0), 0))
        return rows.unfold(-1, self.dim, 1)[..., : self.dim, :].flip(-2)

    @abstractmethod
    def to_dense(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class TrilToeplitzMatrix(ToeplitzMatrix):
    """Lower-triangular Toeplitz matrices, K_ij = k_{i−j} for i ≥ j."""

    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return self._multiply(X, scale, transposed=False)

    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return self._multiply(X, scale, transposed=True)

    def to_dense(self) -> Tensor:
        return self._gathered_upper().mT


@dataclass(frozen=True, eq=False)
class TriuToeplitzMatrix(ToeplitzMatrix):
    """Upper-triangular Toeplitz matrices, K_ij = k_{j−i} for j ≥ i."""

    def matmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return self._multiply(X, scale, transposed=True)

    def rmatmat(self, X: Tensor, *, scale: float = 1.0) -> Tensor:
        return self._multiply(X, scale, transposed=False)

    def to_dense(self) -> Tensor:
        return self._gathered_upper()
