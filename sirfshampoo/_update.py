"""The method as tensor functions: learn the factors, pre-condition, descend.

Source: "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order
Perspective" (arXiv 2402.03496), the inverse-free Shampoo of Figure 3. Throughout, the
leading axis of every tensor counts *rows*: units that are treated alike. G stacks
gradients, ``[rows, d_1, …, d_N]``; K, m hold N batched matrices, ``[rows, d_n, d_n]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from math import isfinite, sqrt
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from sirfshampoo import _device
from sirfshampoo.structures import StructuredMatrix
from sirfshampoo.structures.base import (
    accumulation_dtype,
    is_column_major,
    per_matrix,
)
from sirfshampoo.structures.dense import DenseMatrix

#: Where entries of a float16 factor saturate: one update must not reach 65,504.
LARGEST_FLOAT16 = 4096.0


def _mat(X: Tensor, n: int) -> Tensor:
    """Unfold ``[rows, d_1, …, d_N]`` along axis n into ``[rows, d_n, D / d_n]``."""
    return X.movedim(n + 1, 1).reshape(X.shape[0], X.shape[n + 1], -1)


def _fold(X: Tensor, n: int, dims: Sequence[int]) -> Tensor:
    """Undo `_mat`: fold ``[rows, d_n, D / d_n]`` to ``[rows, d_1, …, d_N]``."""
    others = [*dims[:n], *dims[n + 1 :]]
    return X.reshape(X.shape[0], dims[n], *others).movedim(1, n + 1)


def unless_all(mask: Tensor) -> Tensor | None:
    """Return a mask, or None if it holds everywhere and looking at it costs no wait.

    On the CPU that spares the passes that apply it; elsewhere the host would have to
    wait for the device.
    """
    return None if _device.is_at_hand(mask) and bool(mask.all()) else mask


def finite_rows(probes: Tensor) -> Tensor | None:
    """Return where numbers ``[rows]`` are finite, or None like `unless_all`."""
    if _device.is_at_hand(probes) and isfinite(probes.sum().item()):
        return None
    return unless_all(probes.isfinite())


def _number(values: Tensor) -> float | Tensor:
    """Return the only row's value as a number, if looking at it costs no wait.

    With a number, torch fuses products, and does not cast half-precision matrices.
    """
    single = values.numel() == 1 and _device.is_at_hand(values)
    return values.item() if single else values


class Workspace:
    """Memory for large temporaries that is kept from step to step.

    On a CPU, the system takes it back after each use and hands it out anew page by
    page, which costs as much as a good part of a matrix product. Elsewhere torch keeps
    it, and there is none here.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}

    def like(self, K: StructuredMatrix, slot: int) -> StructuredMatrix | None:
        """Return a dense matrix like K with any numbers; None for other structures.

        It is valid until the next one of its slot and type.

        Args:
            K: The matrix.
            slot: What lies in different slots does not overlap.
        """
        if not isinstance(K, DenseMatrix) or not _device.is_at_hand(K.mat):
            return None
        sizes = [t.numel() for t in K.tensors()]
        buffer = self._buffers.get((K.dtype, slot))
        if buffer is None or buffer.numel() < sum(sizes):
            buffer = torch.empty(sum(sizes), dtype=K.dtype)
            self._buffers[K.dtype, slot] = buffer
        parts = buffer[: sum(sizes)].split(sizes)
        pairs = zip(parts, K.tensors(), strict=True)
        return type(K)(*(part.view(t.shape) for part, t in pairs))


class Variant(NamedTuple):
    """Where a step departs from Figure 3; see the constructor of ``SIRFShampoo``."""

    initial_factors: str = "identity"
    momentum_first: bool = False
    nesterov: bool = False
    max_update_rms: float | None = None
    cautious_decay: bool = False


def start_factors(
    K: Sequence[StructuredMatrix], G: Tensor, *, batch_size: int, lam: float
) -> None:
    """Let factors that are 0, which have not started, start at the gradient's scale.

    K_n ← (B · mean(G²) + lam)^(−1/(2N)) · I, which is the fixed point of the update
    for a gradient of uncorrelated, equally large entries. Without a finite scale (for
    a gradient that is not finite, or is 0 without damping) factors stay 0.

    Args:
        K: The factor of each axis.
        G: Gradients of the mean loss, ``[rows, *dims]``.
        batch_size: The number of examples B that the loss averages over.
        lam: Damping.
    """
    starts = K[0].max_abs() == 0
    if _device.is_at_hand(starts) and not bool(starts.any()):
        return
    dtype = accumulation_dtype(G.dtype)
    norm = torch.linalg.vector_norm(G.flatten(1), dim=1, dtype=dtype)
    power = norm.square() * (batch_size / max(G[0].numel(), 1)) + lam
    scale = power.pow(-1 / (2 * len(K)))
    scale = torch.where(starts & scale.isfinite(), scale, torch.zeros_like(scale))
    for K_n in K:
        is_short = K_n.dtype == torch.float16
        within = scale.clamp(max=LARGEST_FLOAT16) if is_short else scale
        K_n.shift_(within.to(K_n.dtype))


def update_factors(
    K: Sequence[StructuredMatrix],
    m: Sequence[StructuredMatrix] | None,
    G: Tensor,
    *,
    times: Sequence[int],
    batch_size: int,
    beta2: float,
    alpha2: float,
    lam: float,
    workspace: Workspace,
) -> Tensor | None:
    """Update the Kronecker factors K and their Riemannian momenta m in place.

    Args:
        K: The factor of each axis.
        m: The momentum of each axis; None if there is none (``alpha2`` is 0).
        G: Gradients of the mean loss, ``[rows, *dims]``.
        times: How often K is multiplied onto a gradient; where it is once, K is
            symmetric, and stays so.
        batch_size: The number of examples B that the loss averages over.
        beta2: Learning rate of the factors.
        alpha2: Riemannian momentum.
        lam: Damping.
        workspace: Memory for what is needed within the call.

    Returns:
        A mask ``[rows]`` that is False where a non-finite gradient, or an overflow,
        left the factors and momenta of a row as they were; None if there is none.
    """
    dims = G.shape[1:]
    A = _whitened(K, G, batch_size)
    # ‖K_n‖_F² / d_n
    needs_traces = lam and len(K) > 1
    traces = [K_n.norm().square() / max(K_n.dim, 1) for K_n in K if needs_traces]

    # s_n = ½ [Π_n(H_n) + lam · ∏_{k≠n} (‖K_k‖_F² / d_k) · Π_n(K_nᵀ K_n) − I]
    s = []
    for n, K_n in enumerate(K):
        X, scale = _mat(A.to(K_n.dtype), n), dims[n] / 2
        if lam:
            others = [trace for k, trace in enumerate(traces) if k != n]
            damping = _number(reduce(torch.mul, others)) if others else 1.0
            s_n = K_n.damped_gram(
                X, scale=scale, damping=damping * lam / 2, out=workspace.like(K_n, n)
            )
        else:
            s_n = K_n.project_gram(X, scale=scale)
        s.append(s_n.shift_(-0.5))

    finite = finite_rows(reduce(torch.add, [s_n.probe() for s_n in s]))
    for n, (K_n, s_n) in enumerate(zip(K, s, strict=True)):
        # m_n ← alpha2 · m_n + (1 − alpha2) · s_n
        weight: float | Tensor = 1 - alpha2
        if finite is not None:
            s_n.clear_(~finite)
            weight = finite.to(accumulation_dtype(s_n.dtype)) * weight
        m_n = s_n if m is None else m[n].lerp_(s_n, weight)
        rate = m_n.norm().clamp_(min=1.0).reciprocal_().mul_(-beta2 * times[n] / 2)
        change = _number(rate if finite is None else rate * finite)
        scratch = None if m is None else s_n
        if times[n] == 2:
            # K_n ← K_n − beta2 / max(1, ‖m_n‖_F) · K_n m_n
            K_n.add_product_(m_n, change, scratch=scratch)
        else:
            # K_n ← E K_n E with E = I − ½ beta2 / max(1, ‖m_n‖_F) · m_n
            K_n.transform_(m_n, change, scratch=scratch)
        if K_n.dtype == torch.float16:
            # without damping, K grows as long as gradients vanish
            K_n.copy_(K_n.scale((LARGEST_FLOAT16 / K_n.max_abs()).clamp(max=1.0)))
    return finite


def _whitened(K: Sequence[StructuredMatrix], G: Tensor, batch_size: int) -> Tensor:
    """Return A = √B · G ×_1 K_1ᵀ ×_2 … ×_N K_Nᵀ, divided by √D.

    K_n/√d_n stands in place of K_n so that half precision stays in range; the missing
    factors return as averages.
    """
    dims, A = G.shape[1:], G
    if not any(K_n.dtype == torch.float16 for K_n in K):
        for n, K_n in enumerate(K):
            scale = sqrt(batch_size / dims[n]) if n == 0 else sqrt(1 / dims[n])
            X = K_n.rmatmat(_mat(A.to(K_n.dtype), n), scale=scale)
            A = _fold(X, n, dims)
        return A
    # float16: gradients of any size; where s would leave its range, A saturates
    size = torch.full_like(_largest(A), sqrt(batch_size))
    for n, K_n in enumerate(K):
        A, largest = _normalized(A)
        size = size * largest
        X = K_n.rmatmat(_mat(A.to(K_n.dtype), n), scale=sqrt(1 / dims[n]))
        A = _fold(X, n, dims).to(accumulation_dtype(X.dtype))
    limit = sqrt(torch.finfo(torch.float16).max / dims.numel()) / 2
    return A * per_matrix((limit / _largest(A)).minimum(size), A)


def _largest(X: Tensor) -> Tensor:
    """Return the largest magnitude in each row, ``[rows]``, as float32 at least."""
    infinity, dtype = float("inf"), accumulation_dtype(X.dtype)
    largest: Tensor = torch.linalg.vector_norm(X.flatten(1), infinity, 1, dtype=dtype)
    return largest


def _normalized(G: Tensor) -> tuple[Tensor, Tensor]:
    """Divide each row by its largest magnitude (if not 0); return that, too."""
    size = _largest(G)
    size = torch.where(size == 0, torch.ones_like(size), size)
    return (G / per_matrix(size, G)).to(G.dtype), size


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


@dataclass(frozen=True)
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
            form = form._replace(squared=False)
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
        return cls(matrix, form._replace(squared=outer is not None), scale)

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
    dims, U = G.shape[1:], G
    scales: list[Tensor] = []
    widen = False
    for n, factor in enumerate(factors):
        if factor.matrix.dtype == torch.float16:  # gradients of any size
            U, largest = _normalized(U)
            scales, widen = [*scales, largest], True
        if factor.scale is not None:
            scales.append(factor.scale)
        X = factor(_mat(U.to(factor.matrix.dtype), n))
        U = _fold(X, n, dims).to(accumulation_dtype(X.dtype) if widen else X.dtype)
    if not widen:  # else one after the other: their product may leave the range
        scales = [reduce(torch.mul, scales)] if scales else []
    for scale in scales:
        U = U * per_matrix(scale, U)
    return U.to(G.dtype)


def limit_update(U: Tensor, *, max_update_rms: float) -> Tensor:
    """Scale rows of U, ``[rows, *dims]``, down to a root mean square of the maximum."""
    dtype = accumulation_dtype(U.dtype)
    norm = torch.linalg.vector_norm(U.flatten(1), dim=1, dtype=dtype)
    scale = max_update_rms * max(U[0].numel(), 1) ** 0.5 / norm
    if unless_all(scale >= 1) is None:
        return U
    return (U * per_matrix(scale.clamp(max=1.0), U)).to(U.dtype)


def accumulate(V: Tensor, G: Tensor, *, alpha1: float, moves: Tensor | None) -> None:
    """Update the momentum of gradients in place: V ← alpha1 · V + G.

    Args:
        V: The momentum of a parameter of the rows, ``[rows, *shape]``.
        G: Its gradients, ``[rows, *shape]``.
        alpha1: Momentum.
        moves: A mask ``[rows]``; where it is False, a row stays as it is. None: all
            rows move.
    """
    if moves is None:
        V.mul_(alpha1).add_(G)
    else:
        V.copy_(torch.where(per_matrix(moves, V), V * alpha1 + G, V))


def descend(
    W: Sequence[Tensor],
    V: Tensor | None,
    U: Tensor,
    *,
    moves: Tensor | None,
    lr: float | Tensor,
    alpha1: float,
    kappa: float,
    variant: Variant,
) -> None:
    """Update parameters and their momentum in place; overwrites U.

    Args:
        W: The parameters of the rows, each of shape ``shape``.
        V: Their momentum, ``[rows, *shape]``; None if ``alpha1`` is 0.
        U: Their pre-conditioned gradients, ``[rows, *shape]``.
        moves: A mask ``[rows]``; where it is False, a row stays as it is. None: all
            rows move.
        lr: Learning rate; a tensor ``[rows]`` has one value a row.
        alpha1: Momentum.
        kappa: Weight decay.
        variant: Where the step departs from Figure 3.
    """
    if kappa:
        decayed = list(W)
        if variant.cautious_decay:
            against = [u * w <= 0 for u, w in zip(U.unbind(0), W, strict=True)]
            pairs = zip(W, against, strict=True)
            decayed = [w.masked_fill(mask, 0.0) for w, mask in pairs]
        torch._foreach_add_(U.unbind(0), decayed, alpha=kappa)
    if moves is None:
        # V ← alpha1 · V + (U + kappa · W)
        # in two passes: one would round once, and not be torch.optim.SGD to the bit
        step = U if V is None else V.mul_(alpha1).add_(U)
        if variant.nesterov and V is not None:
            step = U.add_(V, alpha=alpha1)
    else:
        # a row that rests: V ← 1 · V + 0, W ← W − lr · 0
        rests = per_matrix(~moves, U)
        step = U.masked_fill_(rests, 0.0)
        if V is not None:
            keep = moves.to(accumulation_dtype(V.dtype)) * alpha1 + ~moves
            V.mul_(per_matrix(keep, V)).add_(U)
            step = U.add(V, alpha=alpha1) if variant.nesterov else V
            step = step.masked_fill(rests, 0.0)
    # W ← W − lr · V, or W − lr · (U + alpha1 · V)
    if isinstance(lr, Tensor):  # as `alpha`, the host would wait for it
        torch._foreach_sub_(list(W), (step * per_matrix(lr, step)).unbind(0))
    else:
        torch._foreach_add_(list(W), step.unbind(0), alpha=-lr)
