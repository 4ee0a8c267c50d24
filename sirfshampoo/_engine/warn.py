"""Warnings: what a step does otherwise than a user may think."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from sirfshampoo._distributed import local
from sirfshampoo._engine.units import Unit

#: From here to the line of the user's that called `step`, through torch's wrapper, or
#: the constructor, through those that it calls.
_TO_USER_OF_STEP, _TO_USER_OF_CONSTRUCTOR = 5, 6


def warn_of_callable_interval(names: Sequence[str]) -> None:
    """Warn that `spread_updates` does nothing for parameters."""
    warnings.warn(
        "spread_updates=True has no effect on groups with a callable 'T', which says "
        f"itself when to update: {list(names)}. Use an integer to have them spread.",
        stacklevel=_TO_USER_OF_CONSTRUCTOR,
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
            stacklevel=_TO_USER_OF_STEP,
        )
