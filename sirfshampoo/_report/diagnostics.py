"""Diagnostics: numbers on every unit, for a logger."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sirfshampoo._config.variant import Variant
from sirfshampoo._distributed import whole
from sirfshampoo._engine.joint import joined, joint_gradients, scattered
from sirfshampoo._engine.momenta import whole_momenta
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.step import precondition_rows
from sirfshampoo._method.descent import (
    length_of,
    limiting,
    normalizing,
    row_norms,
    scale_rows,
    size_of,
)
from sirfshampoo._method.following import shrinking
from sirfshampoo.structures.base import accumulation_dtype


def diagnostics(
    stacks: Sequence[Stack],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    present: Sequence[Sequence[bool]],
    variant: Variant,
) -> dict[str, float]:
    """Return numbers on every unit; see ``SIRFShampoo.diagnostics``.

    Args:
        stacks: The stacks that hold the units.
        groups: The parameter group of each unit.
        names: The names of each unit's parameters.
        present: Whether each of them has a gradient, on every rank.
        variant: How a step is taken.
    """
    of_unit: dict[int, dict[str, Tensor]] = {}
    for stack in stacks:
        for row, unit in enumerate(stack.units):
            lr = float(groups[unit.group]["lr"])
            alpha1 = float(groups[unit.group]["alpha1"])
            # needs all ranks
            found = _of_direction(stack, row, present[unit.group], lr, alpha1, variant)
            if stack.held:
                of_unit[unit.group] = _of_row(stack, row, lr, *found)
    labels = ["+".join(of_unit) for of_unit in names]
    # names that users gave need not differ
    times = Counter(labels)
    unique = [n if times[n] == 1 else f"{n}#{i}" for i, n in enumerate(labels)]
    values = {
        f"{unique[index]}/{key}": value
        for index, numbers in sorted(of_unit.items())
        for key, value in numbers.items()
    }
    told = dict.fromkeys(values, 0.0)
    for device in {value.device for value in values.values()}:
        here = {key: v.double() for key, v in values.items() if v.device == device}
        told |= zip(here, torch.stack(list(here.values())).tolist(), strict=True)
    return told


def _of_direction(
    stack: Stack,
    row: int,
    present: Sequence[bool],
    lr: float,
    alpha1: float,
    variant: Variant,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a unit's parameters move along, and its momentum.

    Each is empty if there is none, or it is not known on this rank.
    """
    unit, rows = stack.units[row], slice(row, row + 1)
    momentum = whole_momenta([V_j[rows] for V_j in stack.V or []], [unit])
    V = joined([unit], momentum) if momentum else None
    G = None
    if (V is None or variant.nesterov) and any(present):
        G = joint_gradients([unit], [j for j, has in enumerate(present) if not has])
    if V is not None and variant.momentum_first:
        G, V = V if G is None else G + alpha1 * V, None
    limit = variant.max_relative_update
    W = [] if limit is None else [whole(p.detach()) for p in unit.params]
    if G is None or not stack.held:
        return ([] if V is None else momentum), momentum
    U = precondition_rows(stack, rows, G)
    if variant.normalize_update:
        scale_rows([U], normalizing([U], row_norms(U), sizes=[unit.size]))
    if stack.past is not None:
        scale_rows([U], shrinking(stack.past.mean[rows], row_norms(G)))
    if limit is not None:
        pieces = scattered([unit], U)
        for U_j, W_j in zip(pieces, W, strict=True):
            size = size_of(W_j.shape, embeds=unit.embeds)
            length = length_of(row_norms(W_j.unsqueeze(0)), size=size)
            scale_rows([U_j], limiting(row_norms(U_j), length, limit=limit, lr=lr))
        U = joined([unit], pieces)
    return [U if V is None else U + alpha1 * V], momentum


def _of_row(
    stack: Stack,
    row: int,
    lr: float,
    direction: Sequence[Tensor],
    momentum: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Return numbers on a unit as 0-d tensors."""
    unit = stack.units[row]
    zero = torch.zeros((), dtype=torch.float64, device=stack.skipped.device)
    norm = _norm(direction) if direction else zero / zero
    return {
        "update_norm": norm * lr,
        "update_rms": norm * (lr / max(unit.dims.numel(), 1) ** 0.5),
        "momentum_norm": _norm(momentum) if momentum else zero,
        **{f"K{n}_norm": K_n[row].norm() for n, K_n in enumerate(stack.K)},
        "skipped": stack.skipped[row],
    }


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the norm of tensors taken together."""
    norms = [
        torch.linalg.vector_norm(t, dtype=accumulation_dtype(t.dtype)).double()
        for t in tensors
    ]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole
