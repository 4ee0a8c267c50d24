"""Joint tensors: what a rule makes of a unit's parameters, and back."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Size, Tensor

from sirfshampoo._distributed import is_dtensor, local, whole_rows
from sirfshampoo._engine.units import Unit
from sirfshampoo.combiner import FlattenKernel, PerParameter

#: What only gives one tensor another shape; rows may then stay together.
_RESHAPES = (PerParameter.group, FlattenKernel.group)


def joint_gradients(units: Sequence[Unit], absent: Collection[int] = ()) -> Tensor:
    """Return the joint gradients ``[rows, *dims]`` of units that are alike.

    A rule sees whole gradients, wherever their shards lie.

    Args:
        units: The units, one a row.
        absent: The positions of parameters without gradient, which count as 0.
    """
    first, group = units[0], units[0].rule.group
    if not absent and not any(is_dtensor(p) for p in first.params):
        return stacked([group([p.grad for p in unit.params]) for unit in units])  # type: ignore[misc]
    wholes = [
        whole_zeros(len(units), like)
        if j in absent
        else whole_rows([unit.params[j].grad for unit in units], like)  # type: ignore[misc]
        for j, like in enumerate(first.params)
    ]
    return joined(units, wholes)


def whole_zeros(rows: int, like: Tensor) -> Tensor:
    """Return zeros ``[rows, *shape]`` for parameters, whole, wherever these lie."""
    return local(like.detach()).new_zeros(rows, *like.shape)


def joined(units: Sequence[Unit], wholes: Sequence[Tensor]) -> Tensor:
    """Join whole gradients of each of a unit's parameters, ``[rows, *shape]`` each."""
    rule = units[0].rule
    if type(rule).group in _RESHAPES:
        return _shaped(wholes[0], units[0].dims)
    return stacked([rule.group(list(row)) for row in zip(*wholes, strict=True)])


def stacked(tensors: list[Tensor]) -> Tensor:
    """Stack tensors along a new first axis; a stack of one is a view."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)


def scattered(units: Sequence[Unit], U: Tensor) -> list[Tensor]:
    """Cut ``[rows, *dims]`` back into ``[rows, *shape]`` of each of the parameters."""
    shapes, rule = [p.shape for p in units[0].params], units[0].rule
    if type(rule).ungroup is PerParameter.ungroup:
        return [_shaped(U, shapes[0])]
    rows = [rule.ungroup(row, shapes) for row in U.unbind(0)]
    return [stacked(list(pieces)) for pieces in zip(*rows, strict=True)]


def _shaped(rows: Tensor, shape: Size) -> Tensor:
    """Return ``[rows, *shape]`` with the numbers of ``[rows, *other shape]``."""
    return rows if rows.shape[1:] == shape else rows.reshape(len(rows), *shape)
