"""Warnings: what a step does otherwise than a user may think."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

from sirfshampoo._distributed import local
from sirfshampoo._engine.units import Unit


def tell(message: str) -> None:
    """Warn at the user's line: the first outside of this package and of torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_globals.get("__name__", "").startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_INSIDE = ("sirfshampoo.", "torch.")


def warn_of_callable_interval(names: Sequence[str]) -> None:
    """Warn that `spread_updates` does nothing for parameters."""
    tell(
        "spread_updates=True has no effect on groups with a callable 'T', which says "
        f"itself when to update: {list(names)}. Use an integer to have them spread."
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
        tell(
            f"The gradients of {sick} are not finite: their pre-conditioners rest in "
            "this step."
        )


def warn_of_rest() -> None:
    """Warn that a step moves nothing."""
    tell(
        "No parameter of the optimizer has a gradient (of several ranks: on each of "
        "them), so this step moves nothing: call it after backward(), and with the "
        "parameters that the model is computed with."
    )


def warn_of_void_decay(kappa: float) -> None:
    """Warn that no group takes the weight decay that the constructor was given."""
    tell(
        f"kappa={kappa:.4g} has no effect: every parameter group has a weight decay of "
        "0 of its own, as those of a framework do that is told no weight decay. Tell "
        "the framework, or let the optimizer see the model and not groups."
    )


def warn_of_batch_size(counted: Sequence[int], expected: int) -> None:
    """Warn that settings are made for another batch size than what is counted."""
    numbers = " or ".join(map(str, counted[:3]))
    tell(
        f"{numbers} examples are counted in each of the last steps, but the settings "
        f"are made for {expected}: not what is meant. If {expected} is right, "
        f"pass batch_size={expected} to SIRFShampoo, or a callable that counts the "
        "model's inputs (time-major ones have the batch on their second axis); else "
        f"tell the recipe batch_size={counted[0]}."
    )


def warn_of_gradients_kept(missing: int, counted: int) -> None:
    """Warn that gradients may have been added which are not counted."""
    tell(
        f"Gradients of {missing} examples were taken out of `.grad`, and those in it, "
        f"of {counted} examples, were changed since. If the former were added, the "
        f"batch size is {missing + counted}, and not {counted}: pass it to SIRFShampoo "
        "as an integer, for what is added by hand is not counted."
    )
