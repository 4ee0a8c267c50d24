"""How parameters move: momentum, the size of a step, weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Size, Tensor

from sirfshampoo.structures.base import accumulation_dtype, per_matrix
from sirfshampoo.structures.products import product

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
        shape: That of the parameter; its first axis is m. Axes of size 1 do not count,
            but where there are four or more, as of a convolution's weight, ``[out, in,
            height, width]``: one output is one row.
        embeds: Whether the parameter is the weight of an embedding.
    """
    if embeds:
        return sqrt(shape.numel())
    dims = [d for d in shape if d != 1]
    is_row = len(dims) < 2 or (len(shape) > 3 and shape[0] == 1)
    return 1.0 if is_row else sqrt(dims[0])


def normalizing(
    U: Sequence[Tensor], norms: Tensor, *, sizes: Sequence[float]
) -> Tensor:
    """Divide rows by powers of two, in place, and return what gives them a size.

    U ← size · r^(−1/4) / ‖U‖_S4 · U, for matrices ``[m, D / m]``, r = min(m, D / m).
    The Schatten-4 norm ‖U‖_S4 = ‖U Uᵀ‖_F^(1/2) takes one product, and lies between the
    spectral norm, which sees one direction alone, and the Frobenius norm, which many
    small ones make large. If all r singular values are equal, size is the Frobenius
    norm. A direction that holds most of a large matrix gets 3 · size / √r at most.

    Args:
        U: Pre-conditioned gradients, ``[rows, *dims]`` each. ‖U‖_F lies between ½ and 1
            then, and no digit is lost. What is 0 stays so.
        norms: ‖U‖_F in all their rows, one after the other.
        sizes: What `size_of` says of each.

    Returns:
        What to multiply on, ``[rows]`` of all, one after the other.
    """
    powers = norms.clamp(min=torch.finfo(norms.dtype).tiny).frexp().exponent
    scale = torch.exp2(-powers.to(norms.dtype))
    scale_rows(U, scale)
    parts = (norms * scale).split([len(U_i) for U_i in U])
    triples = zip(U, parts, sizes, strict=True)
    squares = [_squared_size(U_i, norm, size) for U_i, norm, size in triples]
    found = torch.cat(squares).sqrt_()
    return found.reciprocal().masked_fill_(found == 0, 0.0)


def _squared_size(U: Tensor, norm: Tensor, size: float) -> Tensor:
    """Return the square of what rows are to be divided by, ``[rows]``."""
    if U.ndim == 2:
        return (norm / size).square_()
    X = (U.flatten(2) if U.ndim > 3 else U).to(norm.dtype)
    m, r = X.shape[1], min(X.shape[1:])
    scale = max(r, 1) ** 0.5 / size**2
    S = product(X, X.mT, scale) if m == r else product(X.mT, X, scale)
    of_S: Tensor = torch.linalg.vector_norm(S, dim=(1, 2))
    if r <= _LONGEST_DIRECTION**4:  # no direction is longer
        return of_S
    # the power method, from the axis that the diagonal's largest entry belongs to
    largest = S.diagonal(dim1=1, dim2=2).argmax(1)
    v = S.gather(2, largest[:, None, None].expand(-1, r, 1))
    v = product(S, v / per_matrix(of_S, v))
    before = torch.linalg.vector_norm(v, dim=(1, 2))
    after = torch.linalg.vector_norm(product(S, v), dim=(1, 2))
    # of 0, that is 0 / 0
    return of_S.fmax(after / before * (r**0.5 / _LONGEST_DIRECTION**2))


def scale_rows(U: Sequence[Tensor], scale: Tensor) -> None:
    """Multiply rows in place.

    Args:
        U: Tensors ``[rows, *shape]``.
        scale: What to multiply the rows of all by, one after the other.
    """
    parts = scale.split([len(U_i) for U_i in U])
    for U_i, part in zip(U, parts, strict=True):
        U_i.mul_(per_matrix(part, U_i))


def row_norms(X: Tensor) -> Tensor:
    """Return the Frobenius norm of each row, ``[rows]``, as float32 at least."""
    flat, dtype = X.reshape(len(X), X.shape[1:].numel()), accumulation_dtype(X.dtype)
    norms: Tensor = torch.linalg.vector_norm(flat, dim=1, dtype=dtype)
    return norms


def row_sums(X: Tensor) -> Tensor:
    """Return the sum of each row, ``[rows]``, as float32 at least."""
    # one entry that is not finite makes the sum so
    return X.flatten(1).sum(1, dtype=accumulation_dtype(X.dtype))


def length_of(norm: Tensor, *, size: float) -> Tensor:
    """Return max(‖W‖_F, ½ size), beside which steps are limited, ``[rows]``.

    Args:
        norm: ‖W‖_F of parameters, ``[rows]``; overwritten.
        size: What `size_of` says of them.
    """
    return norm.clamp_(min=_LEAST_WEIGHT * size)


def limiting(
    norms: Tensor, lengths: Tensor, *, limit: float, lr: float | Tensor
) -> Tensor:
    """Return what shortens lr · U where it is long beside the parameter, ``[rows]``.

    That is where ‖lr · U‖_F > limit · max(‖W‖_F, ½ size).

    Args:
        norms: ‖U‖_F, ``[rows]``.
        lengths: What `length_of` says of the parameters.
        limit: The longest step, relative to the parameter.
        lr: Learning rate; a tensor ``[rows]`` has one value a row.
    """
    return (lengths * limit).div_(norms * lr).clamp_(max=1.0)


def accumulate(
    V: Sequence[Tensor],
    G: Sequence[Tensor],
    *,
    alpha1: float,
    moves: Sequence[Tensor | None],
) -> None:
    """Update momenta of gradients in place: V ← alpha1 · V + G.

    Args:
        V: Momenta of parameters, ``[rows, *shape]`` each.
        G: Their gradients, ``[rows, *shape]``.
        alpha1: Momentum.
        moves: A mask ``[rows]`` of each; where it is False, a row stays as it is. None:
            all rows move.
    """
    for V_i, G_i, mask in zip(V, G, moves, strict=True):
        if mask is None:
            V_i.mul_(alpha1).add_(G_i)
        else:
            V_i.copy_(torch.where(per_matrix(mask, V_i), V_i * alpha1 + G_i, V_i))


def decay(U: Tensor, W: Tensor, *, kappa: float, cautious: bool) -> None:
    """Add kappa · W to U, in place.

    Args:
        U: Pre-conditioned gradients, ``[rows, *shape]``.
        W: Their parameters, ``[rows, *shape]``.
        kappa: Weight decay.
        cautious: Whether to decay only the weights that U shrinks, too.
    """
    if cautious:
        # by a product: filling by a mask takes ten times as long on a CPU
        U.addcmul_((U * W).gt_(0), W, value=kappa)
    else:
        U.add_(W, alpha=kappa)


def descend(
    W: Sequence[Tensor],
    V: Sequence[Tensor] | None,
    U: Sequence[Tensor],
    *,
    moves: Sequence[Tensor | None],
    lr: float | Sequence[Tensor],
    alpha1: float,
    nesterov: bool,
) -> None:
    """Update parameters and their momenta in place; overwrites U.

    Args:
        W: The parameters of the rows of all, one after the other.
        V: Their momenta, ``[rows, *shape]`` each; None if ``alpha1`` is 0.
        U: Their pre-conditioned gradients and decay, ``[rows, *shape]`` each.
        moves: A mask ``[rows]`` of each; where it is False, a row stays as it is. None:
            all rows move.
        lr: Learning rate; tensors ``[rows]`` have one value a row.
        alpha1: Momentum.
        nesterov: Whether to look ahead along the new momentum.
    """
    # a row that rests: V ← 1 · V + 0, W ← W − lr · 0
    masked = [(i, mask) for i, mask in enumerate(moves) if mask is not None]
    rests = [(i, per_matrix(~mask, U[i])) for i, mask in masked]
    for i, where in rests:
        U[i].masked_fill_(where, 0.0)
    steps = list(U)
    if V is not None:
        keep: list[float | Tensor] = [alpha1] * len(V)
        for i, mask in masked:
            part = mask.to(accumulation_dtype(V[i].dtype)) * alpha1 + ~mask
            keep[i] = per_matrix(part, V[i])
        for V_i, factor in zip(V, keep, strict=True):
            V_i.mul_(factor)
        # in two passes: one would round once, and not be torch.optim.SGD to the bit
        add_each_(V, U)
        if nesterov:
            add_each_(U, V, alpha=alpha1)
        else:
            steps = list(V)
        for i, where in rests:
            steps[i] = steps[i].masked_fill(where, 0.0)
    if not isinstance(lr, float):  # as `alpha`, the host would wait for it
        steps = [x * per_matrix(r, x) for x, r in zip(steps, lr, strict=True)]
        lr = 1.0
    # W ← W − lr · V, or W − lr · (U + alpha1 · V)
    rows = [row for step in steps for row in step.unbind(0)]
    add_each_(W, rows, alpha=-lr)


def add_each_(xs: Sequence[Tensor], ys: Sequence[Tensor], *, alpha: float = 1) -> None:
    """Add in place: x ← x + alpha · y for each pair."""
    if torch.compiler.is_compiling() and not _LISTS_COMPILE:
        for x, y in zip(xs, ys, strict=True):
            x.add_(y, alpha=alpha)
    else:
        torch._foreach_add_(list(xs), list(ys), alpha=alpha)
