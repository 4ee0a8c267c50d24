"""How parameters move: momentum, the limit on a step, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor

from sirfshampoo._method.rows import unless_all
from sirfshampoo.structures.base import accumulation_dtype, per_matrix

# On a GPU, the compiler of torch 2.10 and 2.11 fails where a list of tensors meets a
# reduction (pytorch/pytorch#176591); from 2.12 on, it makes one kernel of the list.
_LISTS_COMPILE = torch.__version__ >= "2.12"


def limit_update(U: Tensor, *, norm: float | None, rms: float | None) -> Tensor:
    """Scale rows of U down to the longest that is allowed.

    Args:
        U: The pre-conditioned gradients, ``[rows, *dims]``.
        norm: The largest Frobenius norm of a row; None: no limit.
        rms: The largest root mean square of its entries. If both are given, what stays
            within one of them passes.
    """
    limits = [] if norm is None else [norm]
    limits += [] if rms is None else [rms * sqrt(U.shape[1:].numel())]
    if not limits:
        return U
    dtype = accumulation_dtype(U.dtype)
    scale = max(limits) / torch.linalg.vector_norm(U.flatten(1), dim=1, dtype=dtype)
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
    nesterov: bool,
    cautious: bool,
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
        nesterov: Whether to look ahead along the new momentum.
        cautious: Whether to decay only the weights that U shrinks, too.
    """
    if kappa:
        decayed = list(W)
        if cautious:
            # by a product: filling by a mask takes ten times as long on a CPU
            pairs = zip(U.unbind(0), W, strict=True)
            decayed = [(u * w).gt_(0).mul_(w) for u, w in pairs]
        _add_each_(U.unbind(0), decayed, alpha=kappa)
    if moves is None:
        # V ← alpha1 · V + (U + kappa · W)
        # in two passes: one would round once, and not be torch.optim.SGD to the bit
        step = U if V is None else V.mul_(alpha1).add_(U)
        if nesterov and V is not None:
            step = U.add_(V, alpha=alpha1)
    else:
        # a row that rests: V ← 1 · V + 0, W ← W − lr · 0
        rests = per_matrix(~moves, U)
        step = U.masked_fill_(rests, 0.0)
        if V is not None:
            keep = moves.to(accumulation_dtype(V.dtype)) * alpha1 + ~moves
            V.mul_(per_matrix(keep, V)).add_(U)
            step = U.add(V, alpha=alpha1) if nesterov else V
            step = step.masked_fill(rests, 0.0)
    # W ← W − lr · V, or W − lr · (U + alpha1 · V)
    if isinstance(lr, Tensor):  # as `alpha`, the host would wait for it
        step, lr = step * per_matrix(lr, step), 1.0
    _add_each_(W, step.unbind(0), alpha=-lr)


def _add_each_(xs: Sequence[Tensor], ys: Sequence[Tensor], *, alpha: float) -> None:
    """Add in place: x ← x + alpha · y for each pair."""
    if torch.compiler.is_compiling() and not _LISTS_COMPILE:
        for x, y in zip(xs, ys, strict=True):
            x.add_(y, alpha=alpha)
    else:
        torch._foreach_add_(list(xs), list(ys), alpha=alpha)
