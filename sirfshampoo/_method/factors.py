"""How Kronecker factors are learned: K and m follow the gradients.

Source: "Can We Remove the Square-Root in Adaptive Gradient Methods? A Second-Order
Perspective" (arXiv 2402.03496), the inverse-free Shampoo of Figure 3. Here and in the
other files of this room, the leading axis of every tensor counts rows; K, m hold N
batched matrices, ``[rows, d_n, d_n]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import sqrt

import torch
from torch import Tensor

from sirfshampoo._method import device
from sirfshampoo._method.lessons import Lesson, Manner, is_small, learn
from sirfshampoo._method.rows import (
    LARGEST_FLOAT16,
    along_axes,
    both,
    each,
    finite_rows,
    magnitude,
    mat,
    normalized,
)
from sirfshampoo.structures import StructuredMatrix
from sirfshampoo.structures.base import accumulation_dtype, per_matrix
from sirfshampoo.structures.dense import DenseMatrix


class Workspace:
    """Memory for large temporaries that is kept from step to step.

    On a CPU, the system takes it back after each use and hands it out anew page by
    page, which costs as much as a good part of a matrix product. Elsewhere torch keeps
    it, and there is none here.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.dtype, int], Tensor] = {}
        self._views: dict[tuple[torch.dtype, int, torch.Size], Tensor] = {}

    def like(self, K: StructuredMatrix, slot: int) -> StructuredMatrix | None:
        """Return a dense matrix like K with any numbers; None for other structures.

        It is valid until the next one of its slot and type.

        Args:
            K: The matrix.
            slot: What lies in different slots does not overlap.
        """
        if not isinstance(K, DenseMatrix) or not device.is_at_hand(K.mat):
            return None
        key = (K.dtype, slot)
        view = self._views.get((*key, K.mat.shape))
        if view is None:
            buffer, number = self._buffers.get(key), K.mat.numel()
            if buffer is None or buffer.numel() < number:
                buffer = torch.empty(number, dtype=K.dtype, device=K.device)
                self._buffers[key] = buffer
                others = {k: v for k, v in self._views.items() if k[:2] != key}
                self._views = others
            view = buffer[:number].view(K.mat.shape)
            self._views[*key, K.mat.shape] = view
        return type(K)(view)


def mean_square(G: Tensor, batch_size: int) -> Tensor:
    """Return B · mean(G²), ``[rows]``.

    Args:
        G: Gradients of the mean loss, ``[rows, *dims]``.
        batch_size: The number of examples B that the loss averages over.
    """
    dtype = accumulation_dtype(G.dtype)
    norm: Tensor = torch.linalg.vector_norm(G.flatten(1), dim=1, dtype=dtype)
    return norm.square_().mul_(batch_size / max(G.shape[1:].numel(), 1))


def start_factors(
    K: Sequence[StructuredMatrix], G: Tensor, *, batch_size: int, lam: float | Tensor
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
    first = K[0].tensors()[0].flatten(1)[:, :1]
    if device.is_at_hand(first) and first.all():  # the usual case, cheap to tell
        return
    starts = K[0].max_abs() == 0
    power = mean_square(G, batch_size) + lam
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
    lam: float | Tensor,
    clamp: str,
    learns: Tensor | None,
    workspace: Workspace,
    lessons: list[Lesson],
) -> Tensor | None:
    """Update the Kronecker factors K and their Riemannian momenta m in place.

    What small factors learn is put into `lessons`; they stay as they are until then.

    Args:
        K: The factor of each axis.
        m: The momentum of each axis; None if there is none (``alpha2`` is 0).
        G: Gradients of the mean loss, ``[rows, *dims]``.
        times: How often K is multiplied onto a gradient; where it is once, K is
            symmetric, and stays so.
        batch_size: The number of examples B that the loss averages over.
        beta2: Learning rate of the factors.
        alpha2: Riemannian momentum.
        lam: Damping; a tensor ``[rows]`` has one value a row.
        clamp: Which norm of m limits its step, ``"frobenius"`` or ``"spectral"``.
        learns: A mask ``[rows]``; where it is False, a row's factors and momenta stay
            as they are. None: all rows learn.
        workspace: Memory for what is needed within the call.
        lessons: Gets what small factors have yet to learn; the caller hands it to
            `learn_together`.

    Returns:
        A mask ``[rows]`` that is False where a non-finite gradient, or an overflow,
        left the factors and momenta of a row as they were; None if there is none.
    """
    dims = G.shape[1:]
    A, share = _whitened(K, G, batch_size)
    if share is not None and isinstance(lam, Tensor):  # in units of the gradient's
        lam = lam * share
    damping = _damping(K, lam)

    # s_n = ½ [Π_n(H_n) + lam · ∏_{k≠n} (‖K_k‖_F² / d_k) · Π_n(K_nᵀ K_n) − I]
    s, are_small = [], [is_small(K_n) for K_n in K]
    for n, K_n in enumerate(K):
        X, scale = mat(A.to(K_n.dtype), n), dims[n] / 2
        if damping:
            out = None if are_small[n] else workspace.like(K_n, n)
            s_n = K_n.damped_gram(X, scale=scale, damping=damping[n], out=out)
        else:
            s_n = K_n.project_gram(X, scale=scale)
        s.append(s_n.shift_(-0.5))

    finite = finite_rows(reduce(torch.add, [s_n.probe() for s_n in s]))
    learns = both(learns, finite)
    for n, (K_n, s_n, small) in enumerate(zip(K, s, are_small, strict=True)):
        lesson = Lesson(
            K_n,
            None if m is None else m[n],
            s_n,
            learns,
            workspace.like(K_n, len(K)) if m is None and not small else None,
            Manner(times[n], beta2, alpha2, clamp),
        )
        if small:
            lessons.append(lesson)
        else:
            learn(lesson)
    return finite


def _damping(
    K: Sequence[StructuredMatrix], lam: float | Tensor
) -> Sequence[float | Tensor]:
    """Return ½ lam · ∏_{k≠n} (‖K_k‖_F² / d_k) for each axis n; nothing if lam is 0."""
    if not isinstance(lam, Tensor):
        if lam == 0 or len(K) == 1:
            return [lam / 2] if lam else []
    elif len(K) == 1:
        return each(lam.unsqueeze(0) / 2)
    traces = [K_n.norm().square_().div_(max(K_n.dim, 1)) for K_n in K]
    of_others = [
        reduce(torch.mul, [trace for k, trace in enumerate(traces) if k != n])
        for n in range(len(K))
    ]
    return each(torch.stack(of_others).mul_(lam / 2))


def _whitened(
    K: Sequence[StructuredMatrix], G: Tensor, batch_size: int
) -> tuple[Tensor, Tensor | None]:
    """Return A = √B · G ×_1 K_1ᵀ ×_2 … ×_N K_Nᵀ, divided by √D.

    K_n/√d_n stands in place of K_n so that half precision stays in range; the missing
    factors return as averages.

    Returns:
        A, and what share of its squares is left where it saturates, ``[rows]``; None:
        all.
    """
    scales = [sqrt(1 / d) for d in G.shape[1:]]
    if not any(K_n.dtype == torch.float16 for K_n in K):
        scales[0] *= sqrt(batch_size)
        whole = along_axes(
            G, lambda n, X: K[n].rmatmat(X.to(K[n].dtype), scale=scales[n])
        )
        return whole, None
    # float16: gradients of any size; where s would leave its range, A saturates
    size = torch.full_like(magnitude(G), sqrt(batch_size))

    def multiply(n: int, X: Tensor) -> Tensor:
        X, largest = normalized(X)
        size.mul_(largest)
        X = K[n].rmatmat(X.to(K[n].dtype), scale=scales[n])
        return X.to(accumulation_dtype(X.dtype))

    A = along_axes(G, multiply)
    limit = sqrt(torch.finfo(torch.float16).max / G.shape[1:].numel()) / 2
    kept = (limit / magnitude(A)).minimum(size)
    return A * per_matrix(kept, A), (kept / size).square()
