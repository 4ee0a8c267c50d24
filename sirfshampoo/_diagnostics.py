"""What an optimizer tells of itself: numbers for a logger, warnings."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sirfshampoo._distributed import distributed_like, local, whole_rows
from sirfshampoo._stack import Stack
from sirfshampoo._units import Unit, joint_gradients
from sirfshampoo.structures.base import accumulation_dtype

#: From here to the line of the user's that called `step`, through torch's wrapper.
_TO_USER = 5


def diagnostics(
    stacks: Sequence[Stack],
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
) -> dict[str, float]:
    """Return numbers on every unit; see ``SIRFShampoo.diagnostics``.

    Args:
        stacks: The stacks that hold the units.
        groups: The parameter group of each unit.
        names: The names of each unit's parameters.
    """
    of_unit: dict[int, dict[str, Tensor]] = {}
    for stack in stacks:
        for row, unit in enumerate(stack.units):
            lr = float(groups[unit.group]["lr"])
            direction = _direction(stack, row)  # needs all ranks, whoever holds it
            if stack.held:
                of_unit[unit.group] = _of_row(stack, row, lr, direction)
    joined = ["+".join(of_unit) for of_unit in names]
    # names that users gave need not differ
    times = Counter(joined)
    unique = [n if times[n] == 1 else f"{n}#{i}" for i, n in enumerate(joined)]
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


def _direction(stack: Stack, row: int) -> list[Tensor]:
    """Return what a unit's parameters move along; nothing if that is not known here."""
    unit = stack.units[row]
    if stack.V is not None:
        return [
            whole_rows([distributed_like(V_j[row], p)], p)
            for V_j, p in zip(stack.V, unit.params, strict=True)
            if len(V_j)
        ]
    if not unit.has_gradients():
        return []
    G = joint_gradients([unit])
    return [stack.precondition(slice(row, row + 1), G)] if stack.held else []


def _of_row(
    stack: Stack, row: int, lr: float, direction: list[Tensor]
) -> dict[str, Tensor]:
    """Return numbers on a unit as 0-d tensors."""
    unit = stack.units[row]
    zero = torch.zeros((), dtype=torch.float64, device=stack.skipped.device)
    norms = [
        torch.linalg.vector_norm(t, dtype=accumulation_dtype(t.dtype)).double()
        for t in direction
    ]
    norm = torch.linalg.vector_norm(torch.stack(norms)) if norms else zero / zero
    return {
        "update_rms": norm * (lr / max(unit.dims.numel(), 1) ** 0.5),
        "momentum_norm": zero if stack.V is None else norm,
        **{f"K{n}_norm": K_n[row].norm() for n, K_n in enumerate(stack.K)},
        "skipped": stack.skipped[row],
    }


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
