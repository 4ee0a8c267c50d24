"""The momenta V of parameters: one tensor ``[rows, *shape]`` for each of a unit's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sirfshampoo._distributed import (
    is_dtensor,
    local,
    local_like,
    whole_stack,
)
from sirfshampoo._engine.joint import stacked
from sirfshampoo._engine.units import Unit
from sirfshampoo._method.descent import add_each_


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


def shards_of_gradients(units: Sequence[Unit], j: int) -> Tensor:
    """Return the j-th gradients of units, what of them lies here, ``[rows, *shape]``.

    Ranks communicate if a gradient is distributed otherwise than its parameter, as one
    that is yet to be summed.
    """
    params = [unit.params[j] for unit in units]
    found: list[Tensor] = [p.grad for p in params]  # type: ignore[misc]
    if is_dtensor(params[0]):
        found = [local_like(G, p) for G, p in zip(found, params, strict=True)]
    return stacked(found).to(params[0].dtype)


def ahead(
    V: Sequence[Tensor], G: Sequence[Tensor], *, alpha1: float, nesterov: bool
) -> list[Tensor]:
    """Return what is pre-conditioned where momenta come first; V stays as it is.

    Args:
        V: Momenta of parameters, ``[rows, *shape]`` each.
        G: Their gradients, ``[rows, *shape]``.
        alpha1: Momentum.
        nesterov: Whether to look ahead along the new momentum.

    Returns:
        alpha1 · V + G; or, ahead of it, G + alpha1 · (alpha1 · V + G).
    """
    if not nesterov:
        return [
            torch.add(G_i, V_i, alpha=alpha1) for G_i, V_i in zip(G, V, strict=True)
        ]
    new = [G_i * (1 + alpha1) for G_i in G]
    add_each_(new, V, alpha=alpha1**2)
    return new


def whole_momenta(V: Sequence[Tensor], units: Sequence[Unit]) -> list[Tensor]:
    """Return whole momenta of each of a unit's parameters, ``[rows, *shape]``.

    Nothing of what lies on another rank. Ranks communicate if parameters are
    distributed.

    Args:
        V: The momenta, ``[rows, *local shape]`` each; none if there are none.
        units: The units of these rows.
    """
    pairs = zip(V, units[0].params, strict=False)
    return [whole_stack(V_j, p) for V_j, p in pairs if len(V_j)]
