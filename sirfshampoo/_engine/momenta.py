"""The momenta V of parameters: one tensor ``[rows, *shape]`` for each of a unit's."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from sirfshampoo._distributed import (
    distributed_like,
    is_dtensor,
    local,
    shard_rows,
    whole_rows,
)
from sirfshampoo._engine.joint import whole_zeros
from sirfshampoo._engine.units import Unit
from sirfshampoo._method.descent import accumulate

#: What the state calls a momentum: of pre-conditioned gradients, as torch's optimizers
#: do; and of gradients, which is another thing in another size.
OF_UPDATES, OF_GRADIENTS = "momentum_buffer", "gradient_momentum"


def zero_momenta(units: Sequence[Unit], *, held: bool) -> list[Tensor]:
    """Return momenta of zeros for units that are alike.

    Args:
        units: The units, one a row.
        held: Whether their factors lie on this rank. If not, momenta of whole
            parameters have no rows; shards of a momentum lie with their parameter's.
    """
    momenta = []
    for p in units[0].params:
        shard = local(p.detach())
        rows = len(units) if held or is_dtensor(p) else 0
        momenta.append(
            # one parameter keeps its memory format
            torch.zeros_like(shard).unsqueeze(0)
            if rows == 1
            else shard.new_zeros(rows, *shard.shape)
        )
    return momenta


def add_gradients(
    V: Sequence[Tensor],
    units: Sequence[Unit],
    G: Sequence[Tensor],
    *,
    absent: Collection[int],
    alpha1: float,
    moves: Tensor | None,
) -> None:
    """Update momenta of gradients in place: V ← alpha1 · V + G.

    Args:
        V: The momenta, ``[rows, *local shape]`` each.
        units: The units of these rows.
        G: The whole gradients of each of a unit's parameters, ``[rows, *shape]``.
        absent: The positions of parameters without gradient, whose momenta rest.
        alpha1: Momentum.
        moves: Which rows move; None: all.
    """
    for j, (V_j, G_j) in enumerate(zip(V, G, strict=True)):
        if j not in absent:
            shards = shard_rows(G_j, units[0].params[j])
            accumulate(V_j, shards, alpha1=alpha1, moves=moves)


def whole_momenta(
    V: Sequence[Tensor], units: Sequence[Unit], absent: Collection[int] = ()
) -> list[Tensor]:
    """Return whole momenta of each of a unit's parameters, ``[rows, *shape]``.

    Nothing of what lies on another rank. Ranks communicate if parameters are
    distributed.

    Args:
        V: The momenta, ``[rows, *local shape]`` each; none if there are none.
        units: The units of these rows.
        absent: The positions of parameters without gradient: zeros in their place.
    """
    wholes = []
    for j, (V_j, p) in enumerate(zip(V, units[0].params, strict=False)):
        if len(V_j) and j in absent:
            wholes.append(whole_zeros(len(V_j), p))
        elif len(V_j) and is_dtensor(p):
            shards = [distributed_like(v, p) for v in V_j.unbind(0)]
            wholes.append(whole_rows(shards, p))
        elif len(V_j):
            wholes.append(V_j)
    return wholes
