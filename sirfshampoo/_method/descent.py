"""How parameters move: momentum, the size of a step, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Size, Tensor

from sirfshampoo._method.rows import magnitude, unless_all
from sirfshampoo.structures.base import accumulation_dtype, per_matrix

#: No singular value of U is longer than so many times that of orthonormal rows.
_LONGEST_DIRECTION = 3.0

#: A parameter that is smaller, such as one that starts at 0, counts as so many times
#: what `size_of` says: torch's own start of a linear layer is 0.58 times that.
_LEAST_WEIGHT = 0.5

# On a GPU, the compiler of torch 2.10 and 2.11 fails where a list of tensors meets a
# reduction (pytorch/pytorch#176591); from 2.12 on, it makes one kernel of the list.
_LISTS_COMPILE = torch.__version__ >= "2.12"


def size_of(shape: Size, *, embeds: bool) -> float:
    """Return the Frobenius norm that a parameter's update of size 1 has.

    Rows of a matrix then have length 1, √m in all; a vector is one row. What an
    embedding looks up is no weight of inputs, but output: each entry counts 1.

    Args:
        shape: That of the parameter, its first axis is m.
        embeds: Whether the parameter is the weight of an embedding.
    """
    if embeds:
        return sqrt(shape.numel())
    return sqrt(shape[0]) if len(shape) > 1 else 1.0


def normalize_update(U: Tensor, *, size: float) -> Tensor:
    """Scale rows of U to a size.

    U ← size · r^(−1/4) / ‖U‖_S4 · U, for matrices ``[m, D / m]``, r = min(m, D / m).
    The Schatten-4 norm ‖U‖_S4 = ‖U Uᵀ‖_F^(1/2) takes one product, and lies between the
    spectral norm, which sees one direction alone, and the Frobenius norm, which many
    small ones make large. If all r singular values are equal, size is the Frobenius
    norm. A direction that holds most of a large matrix gets 3 · size / √r at most.

    Args:
        U: The pre-conditioned gradients, ``[rows, *dims]``. What is 0 stays so.
        size: What `size_of` says.
    """
    X = U.flatten(2) if U.ndim > 2 else U.unsqueeze(1)
    m, r = X.shape[1], min(X.shape[1:])
    top = magnitude(U)
    X = X.to(top.dtype) / per_matrix(top.clamp(min=torch.finfo(top.dtype).tiny), X)
    S = X @ X.mT if m == r else X.mT @ X
    norm = torch.linalg.vector_norm(S.flatten(1), dim=1).sqrt()
    scale = size * max(r, 1) ** -0.25 / norm
    if r > _LONGEST_DIRECTION**4:  # else no direction is longer
        v = torch.zeros_like(S[..., :1])
        largest = S.diagonal(dim1=-2, dim2=-1).argmax(-1)
        v.scatter_(-2, largest[:, None, None], 1.0)
        for _ in range(3):  # the power method
            v = S @ (v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
        spectral = torch.linalg.vector_norm(v, dim=(-2, -1)).sqrt()
        scale = scale.minimum(_LONGEST_DIRECTION * size / sqrt(r) / spectral)
    scale = scale.masked_fill(norm == 0, 0.0)
    return (X * per_matrix(scale, X)).to(U.dtype).view_as(U)


def squared_norms(U: Tensor, W: Sequence[Tensor]) -> Tensor:
    """Return ‖U‖² and ‖W‖² of each row, ``[2, rows]``; of shards, their shares.

    Args:
        U: The pre-conditioned gradients of parameters, ``[rows, *shape]``.
        W: The parameters of the rows, each of shape ``shape``.
    """
    dtype = accumulation_dtype(U.dtype)
    of_U = torch.linalg.vector_norm(U.reshape(len(U), U[0].numel()), dim=1, dtype=dtype)
    of_W = torch.stack(list(_norms(W, dtype)))
    return torch.stack([of_U, of_W]).square_()


def limit_update(
    U: Tensor, squares: Tensor, *, limit: float, lr: float | Tensor, size: float
) -> Tensor:
    """Scale rows of U down where lr · U is long beside the parameter.

    That is where ‖lr · U‖_F > limit · max(‖W‖_F, ½ size).

    Args:
        U: The pre-conditioned gradients of parameters, ``[rows, *shape]``.
        squares: The ``[2, rows]`` of `squared_norms`, of whole parameters.
        limit: The longest step, relative to the parameter.
        lr: Learning rate; a tensor ``[rows]`` has one value a row.
        size: What `size_of` says of a whole parameter.
    """
    of_U, of_W = squares.sqrt().unbind(0)
    longest = of_W.clamp(min=_LEAST_WEIGHT * size) * limit
    scale = longest / (of_U * lr)
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


def _norms(xs: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """Return the Frobenius norm of each tensor, in a type."""
    if torch.compiler.is_compiling() and not _LISTS_COMPILE:
        return [torch.linalg.vector_norm(x, dtype=dtype) for x in xs]
    return torch._foreach_norm(list(xs), dtype=dtype)


def _add_each_(xs: Sequence[Tensor], ys: Sequence[Tensor], *, alpha: float) -> None:
    """Add in place: x ← x + alpha · y for each pair."""
    if torch.compiler.is_compiling() and not _LISTS_COMPILE:
        for x, y in zip(xs, ys, strict=True):
            x.add_(y, alpha=alpha)
    else:
        torch._foreach_add_(list(xs), list(ys), alpha=alpha)
