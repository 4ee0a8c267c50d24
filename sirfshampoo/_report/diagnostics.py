"""What an optimizer tells of itself: numbers for a logger, warnings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sirfshampoo._distributed import local
from sirfshampoo._engine.stacks import Stack
from sirfshampoo._engine.units import Unit, joined, joint_gradients
from sirfshampoo._method.descent import Variant, limit_update
from sirfshampoo.structures.base import accumulation_dtype

#: From here to the line of the user's that called `step`, through torch's wrapper.
_TO_USER = 5


def diagnostics(
    stacks: Sequence[Stack],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    variant: Variant,
) -> dict[str, float]:
    """Return numbers on every unit; see ``SIRFShampoo.diagnostics``.

    Args:
        stacks: The stacks that hold the units.
        groups: The parameter group of each unit.
        names: The names of each unit's parameters.
        variant: How a step is taken.
    """
    of_unit: dict[int, dict[str, Tensor]] = {}
    for stack in stacks:
        for row, unit in enumerate(stack.units):
            lr = float(groups[unit.group]["lr"])
            alpha1 = float(groups[unit.group]["alpha1"])
            found = _of_direction(stack, row, alpha1, variant)  # needs all ranks
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
    stack: Stack, row: int, alpha1: float, variant: Variant
) -> tuple[list[Tensor], list[Tensor]]:
    """Return what a unit's parameters move along, and its momentum.

    Each is empty if there is none, or it is not known on this rank.
    """
    unit, rows = stack.units[row], slice(row, row + 1)
    momentum = stack.whole_momenta(rows)
    V = joined([unit], momentum) if momentum else None
    G = None
    if (V is None or variant.nesterov) and unit.has_gradients():
        G = joint_gradients([unit])
    if V is not None and variant.momentum_first:
        G, V = V if G is None else G + alpha1 * V, None
    if G is None or not stack.held:
        return ([] if V is None else momentum), momentum
    U = limit_update(stack.precondition(rows, G), variant)
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


def partly_missing_gradients(units: Sequence[Unit]) -> set[int]:
    """Return the indices of the units of which some, but not all gradients are None."""
    return {
        unit.group
        for unit in units
        if len(unit.params) > 1 and len({p.grad is None for p in unit.params}) == 2
    }


def warn_of_missing_gradients(
    units: Sequence[Unit], names: Sequence[Sequence[str]], indices: set[int]
) -> None:
    """Warn that units rest although some of their gradients are there."""
    for i in sorted(indices):
        pairs = zip(names[i], units[i].params, strict=True)
        missing = [name for name, p in pairs if p.grad is None]
        warnings.warn(
            f"{missing} have no gradient, so all that share their pre-conditioner, "
            f"{list(names[i])}, rest. Freeze parameters before the optimizer is "
            "built, or leave them to PerParameter in 'combine_params'.",
            stacklevel=_TO_USER,
        )


def warn_of_callable_interval(names: Sequence[str]) -> None:
    """Warn that `spread_updates` does nothing for parameters."""
    warnings.warn(
        "spread_updates=True has no effect on groups with a callable 'T', which says "
        f"itself when to update: {list(names)}. Use an integer to have them spread.",
        stacklevel=_TO_USER,
    )


def warn_of_non_finite_gradients(
    units: Sequence[Unit], names: Sequence[Sequence[str]]
) -> None:
    """Warn of gradients that are not finite; their units rest."""
    sick = [
        name
        for unit in units
        for name, p in zip(names[unit.group], unit.params, strict=True)
        if p.grad is not None and not bool(local(p.grad).isfinite().all())
    ]
    if sick:
        warnings.warn(
            f"The gradients of {sick} are not finite: their pre-conditioners rest in "
            "this step.",
            stacklevel=_TO_USER,
        )
