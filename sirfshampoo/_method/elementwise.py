"""The method where all factors are diagonal, with fewer passes over the gradient.

Both functions do what their namesakes in `factors` and `preconditioner` do. Here the
entries of G are squared once, and each Π_n(H_n) is a sum of them with the squares of K
as weights: a product of a matrix and a vector. All is computed in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from math import prod

import torch
from torch import Tensor

from sirfshampoo._method.preconditioner import Form
from sirfshampoo._method.rows import LARGEST_FLOAT16, both, finite_rows
from sirfshampoo.structures.base import accumulation_dtype
from sirfshampoo.structures.diagonal import DiagonalMatrix


def update_factors(
    K: Sequence[DiagonalMatrix],
    m: Sequence[DiagonalMatrix] | None,
    G: Tensor,
    *,
    times: Sequence[int],
    batch_size: int,
    beta2: float,
    alpha2: float,
    lam: float | Tensor,
    clamp: str,
    learns: Tensor | None,
) -> Tensor | None:
    """Update the factors K and their Riemannian momenta m in place.

    See ``factors.update_factors`` for arguments and result.
    """
    dims = G.shape[1:]
    squares = _squares(K, G)
    Q = G.to(squares[0].dtype).square()
    traces = [k2.mean(-1, keepdim=True) for k2 in squares]  # ‖K_n‖_F² / d_n

    if isinstance(lam, Tensor):
        lam = lam.unsqueeze(-1)
    # s_n = ½ [Π_n(H_n) + lam · ∏_{k≠n} (‖K_k‖_F² / d_k) · Π_n(K_nᵀ K_n) − I]
    s = []
    for n, k2 in enumerate(squares):
        h = _weighted_sums(Q, squares, n).mul_(batch_size * dims[n] / dims.numel() / 2)
        others = [trace for k, trace in enumerate(traces) if k != n]
        h += reduce(torch.mul, others) * (lam / 2) if others else lam / 2
        s.append(h.mul_(k2).sub_(0.5))

    # a number that is not finite makes the sum so
    finite = finite_rows(torch.cat(s, -1).sum(-1))
    learns = both(learns, finite)
    mask = None if learns is None else learns.unsqueeze(-1)
    for n, (K_n, s_n) in enumerate(zip(K, s, strict=True)):
        k, dtype = K_n.diag, K_n.dtype
        if dtype == torch.float16:
            s_n.clamp_(max=LARGEST_FLOAT16)
        # m_n ← alpha2 · m_n + (1 − alpha2) · s_n
        if mask is not None:
            s_n.masked_fill_(~mask, 0.0)
        if m is None:
            m_n = s_n
        elif mask is None:
            m_n = m[n].diag.lerp_(s_n.to(dtype), 1 - alpha2)
        else:
            weight = mask.to(s_n.dtype) * (1 - alpha2)
            m_n = m[n].diag.lerp_(s_n.to(dtype), weight.to(dtype))
        # K_n ← K_n E with E = I − beta2 / max(1, ‖m_n‖_F) · m_n; where K_n is applied
        # once, K_n ← E K_n E with half the rate
        order = float("inf") if clamp == "spectral" else 2
        norm = torch.linalg.vector_norm(m_n, order, -1, keepdim=True, dtype=s_n.dtype)
        rate = norm.clamp_(min=1.0).reciprocal_()
        if mask is not None:
            rate *= mask
        change = m_n * (rate * -beta2)
        if times[n] == 1:
            change = change + change.square() / 4  # (1 + x / 2)² − 1
        k.addcmul_(k, change.to(dtype))
        if dtype == torch.float16:
            k.clamp_(-LARGEST_FLOAT16, LARGEST_FLOAT16)
    return finite


def precondition(
    K: Sequence[DiagonalMatrix], G: Tensor, *, forms: Sequence[Form]
) -> Tensor:
    """Return U = G ×_1 P_1 ×_2 … ×_N P_N in G's type; see ``preconditioner``."""
    U: Tensor | None = None
    for n, (k2, form) in enumerate(zip(_squares(K, G), forms, strict=True)):
        weights = k2 if form.times == 2 else K[n].diag.to(k2.dtype)
        if form.size:
            mean = k2.mean(-1, keepdim=True).clamp(min=torch.finfo(k2.dtype).tiny)
            weights = weights * mean ** (form.size / 2)
        weights = weights.reshape(len(G), *(-1 if i == n else 1 for i in range(len(K))))
        U = G * weights if U is None else U.mul_(weights)
    return G if U is None else U.to(G.dtype)


def _squares(K: Sequence[DiagonalMatrix], G: Tensor) -> list[Tensor]:
    """Return the diagonals of K_n K_nᵀ in the type that all is computed in."""
    dtype = accumulation_dtype(G.dtype)
    for K_n in K:
        dtype = torch.promote_types(dtype, K_n.dtype)
    return [K_n.diag.to(dtype).square() for K_n in K]


def _weighted_sums(Q: Tensor, squares: Sequence[Tensor], n: int) -> Tensor:
    """Return the sums of Q over all axes but n, weighted by the squares of theirs."""
    rows, dims = len(Q), Q.shape[1:]
    if n + 1 < len(dims):
        weights = _joint_weights(squares[n + 1 :]).unsqueeze(-2)
        # a row times a batch of matrices is several times faster than these times it
        Q = weights @ Q.reshape(rows, prod(dims[: n + 1]), -1).mT
    if n > 0:
        weights = _joint_weights(squares[:n]).unsqueeze(-2)
        Q = weights @ Q.reshape(rows, -1, dims[n])
    return Q.reshape(rows, dims[n])


def _joint_weights(squares: Sequence[Tensor]) -> Tensor:
    """Return all products of entries of several axes, ``[rows, d · d' · …]``."""

    def join(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(1)

    return reduce(join, squares)
