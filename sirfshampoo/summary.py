"""What an optimizer would cost, told before it is built."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.nn import Module

from sirfshampoo._report.table import Summary
from sirfshampoo.optimizer import SIRFShampoo

__all__ = ["Summary", "summary"]


class _Plan(SIRFShampoo):
    """An optimizer that knows its units, and allocates nothing for them."""

    _ALLOCATES = False


def summary(
    model_or_params: Module | Iterable[Any],
    params: Iterable[Any] | None = None,
    **options: Any,
) -> Summary:
    """Tell what `SIRFShampoo` would keep and compute, before anything is allocated.

    Takes the arguments of `SIRFShampoo`, and groups parameters as it does. Parameters
    may be on any device, on ``torch.device("meta")`` too: a model that is built there
    takes no memory, however large.

    Args:
        model_or_params: The neural network, or what else the constructor accepts.
        params: The parameters to train, as for the constructor.
        options: The constructor's other arguments. ``batch_size`` and ``verbose_init``
            change nothing.

    Returns:
        A row for each pre-conditioner: the names of its parameters, their joint shape,
        the structures and types of the factors, the bytes of the state, and the
        floating-point operations of an update of the factors and of a step.

    Raises:
        ValueError: If an argument is wrong, or if no rule takes a parameter.

    Example:
        >>> with torch.device("meta"):
        ...     model = torch.nn.Linear(50257, 768)
        >>> summary(model, structures="diagonal").totals["state_bytes"]
        154806952
    """
    # with an integer, no forward pass needs to be watched
    quiet = {**options, "batch_size": 1, "verbose_init": False}
    return _Plan(model_or_params, params, **quiet)._summary()
