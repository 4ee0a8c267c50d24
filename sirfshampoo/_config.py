"""Reads what the user wrote and refuses what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from sirfshampoo.combiner import PreconditionerGroup
from sirfshampoo.structures import structure_class

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

#: Powers of the inverse that come from products alone.
EXPONENTS = (0.5, 0.75, 1.0)

#: What other optimizers call things, and what to write here.
_FOREIGN = {
    "momentum": "'alpha1'",
    "betas": "'alpha1' for the momentum, 'beta2' for the factors' learning rate",
    "eps": "'lam'",
    "damping": "'lam'",
}

#: Arguments of the constructor that hold for all parameters.
_OF_ALL = (
    "batch_size",
    "verbose_init",
    "spread_updates",
    "process_group",
    "shard_preconditioners",
    "initial_factors",
    "exponent",
    "momentum_first",
    "nesterov",
    "max_update_norm",
    "max_update_rms",
    "cautious_decay",
)


def _number(rule: str, allowed: Callable[[float], bool]) -> Callable[[str, Any], None]:
    """Return the check of a real number against a rule."""

    def check(argument: str, value: Any) -> None:
        number = value
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            number = value.item()
        if (
            isinstance(number, bool)
            or not isinstance(number, Real)
            or not isfinite(number)
            or not allowed(float(number))
        ):
            raise ValueError(f"Argument '{argument}' must be {rule}, got {value!r}.")

    return check


def _check_T(argument: str, value: Any) -> None:
    positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
    if not positive and not callable(value):
        raise ValueError(
            f"Argument '{argument}' must be an integer > 0 or a callable from the step "
            f"to a boolean, got {value!r}."
        )


def _check_rules(argument: str, value: Any) -> None:
    rules = value if isinstance(value, (tuple, list)) and value else (None,)
    for rule in rules:
        if not isinstance(rule, PreconditionerGroup):
            raise ValueError(
                f"Argument '{argument}' must be a non-empty tuple of instances of "
                f"PreconditionerGroup, got {value!r}."
            )


def check_structure(argument: str, name: Any) -> None:
    """Check the name of a structure."""
    if not isinstance(name, str):
        raise ValueError(f"Argument '{argument}' must name structures, got {name!r}.")
    try:
        structure_class(name)
    except ValueError as error:
        raise ValueError(
            f"Argument '{argument}' must name supported structures. {error}"
        ) from None


def _check_entry(argument: str, entry: Any) -> None:
    """Check what stands for one axis in `structures` or `preconditioner_dtypes`."""
    if argument == "structures":
        check_structure(argument, entry)
    elif entry is not None and entry not in SUPPORTED_DTYPES:
        raise ValueError(
            f"Argument 'preconditioner_dtypes' must hold None or one of "
            f"{list(SUPPORTED_DTYPES)}, got {entry!r}."
        )


def _check_axes(argument: str, value: Any) -> None:
    """Check a specification by axis count and axis, before it meets a tensor."""
    by_count = value if isinstance(value, Mapping) else {None: value}
    for count, entries in by_count.items():
        if count is not None and (
            isinstance(count, bool) or not isinstance(count, int) or count < 1
        ):
            raise ValueError(
                f"Argument '{argument}' must map numbers of axes (integers > 0) to "
                f"entries, got the key {count!r}."
            )
        if not isinstance(entries, (tuple, list)):
            entries = (entries,)
        elif count is not None and len(entries) != count:
            raise ValueError(
                f"Argument '{argument}' must have {count} entries for tensors with "
                f"{count} axes, got {entries!r}."
            )
        for entry in entries:
            _check_entry(argument, entry)


_non_negative = _number("a finite number >= 0", lambda x: x >= 0)
_positive = _number("None or a finite number > 0", lambda x: x > 0)
_above_0 = _number("a finite number > 0", lambda x: x > 0)
_fraction = _number("a number in [0, 1)", lambda x: 0 <= x < 1)
_fractions = _number("numbers in [0, 1)", lambda x: 0 <= x < 1)

_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "lr": _non_negative,
    "beta2": _non_negative,
    "alpha1": _fraction,
    "alpha2": _fraction,
    "lam": _non_negative,
    "kappa": _non_negative,
    "T": _check_T,
    "structures": _check_axes,
    "preconditioner_dtypes": _check_axes,
    "combine_params": _check_rules,
}

#: The options of a parameter group.
OPTIONS = tuple(_CHECKS)

#: What schedulers that cycle the momentum call ``alpha1``.
CYCLED_MOMENTUM = "momentum"


#: The options that are numbers; of these, the learning rate may stay a tensor.
_NUMBERS = ("lr", "beta2", "alpha1", "alpha2", "lam", "kappa")


def own_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return copies of a group's numbers that are tensors, for a group of its own.

    A scheduler writes into ``lr``, which hence stays a tensor; others become numbers,
    since a step cannot read them without waiting for their device.
    """
    numbers = plain_numbers(group)
    if "lr" in numbers:
        numbers["lr"] = group["lr"].detach().clone().reshape(())
    return numbers


def plain_numbers(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a group's numbers that are tensors as numbers."""
    tensors = {n: group[n] for n in _NUMBERS if isinstance(group.get(n), Tensor)}
    return {name: tensor.item() for name, tensor in tensors.items()}


def adopt_cycled_momentum(group: dict[str, Any]) -> None:
    """Set a group's ``alpha1`` to what a scheduler has put beside it."""
    if CYCLED_MOMENTUM in group:
        group["alpha1"] = float(group[CYCLED_MOMENTUM])


def with_kappa(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options with ``weight_decay``, torch's name, as ``kappa``.

    Raises:
        ValueError: If both are there and differ.
    """
    named = dict(options)
    if "weight_decay" in named:
        decay = named.pop("weight_decay")
        if named.setdefault("kappa", decay) != decay:
            raise ValueError(
                "Argument 'weight_decay' is another name of 'kappa' and must not "
                f"differ from it, got {decay!r} and {named['kappa']!r}."
            )
    return named


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a parameter group; those not of this package are ignored.

    Raises:
        ValueError: If a value is wrong, or if an option is given that would have no
            effect, as it is another optimizer's or one for all parameters.
    """
    for name, value in options.items():
        if name in _CHECKS:
            _CHECKS[name](name, value)
        elif name in _FOREIGN:
            raise ValueError(
                f"Argument '{name}' is not an option of SIRFShampoo: use "
                f"{_FOREIGN[name]} in its place. Got {value!r}."
            )
        elif name in _OF_ALL:
            raise ValueError(
                f"Argument '{name}' holds for all parameters: give it to the "
                f"constructor, not to a group. Got {value!r}."
            )


def check_model(model: Any, params: Any) -> None:
    """Check the constructor's `model` and `params`."""
    if isinstance(model, Module):
        return
    if isinstance(model, Tensor) or not isinstance(model, Iterable):
        raise ValueError(
            "Argument 'model' must be a torch.nn.Module, or parameters in its place, "
            f"got {type(model).__name__}."
        )
    if params is not None:
        raise ValueError(
            "Argument 'params' must be None if parameters stand in the place of "
            f"'model', got {type(params).__name__}."
        )


def check_batch_size(batch_size: Any, model: Any) -> None:
    """Check the constructor's `batch_size`."""
    positive = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not (positive and batch_size > 0) and not callable(batch_size):
        raise ValueError(
            "Argument 'batch_size' must be an integer > 0 or a callable from the "
            f"model's inputs to one, got {batch_size!r}."
        )
    if callable(batch_size) and not isinstance(model, Module):
        raise ValueError(
            "Argument 'batch_size' must be an integer > 0 if parameters stand in the "
            "place of 'model': there are no forward passes to count examples in. Got "
            f"{batch_size!r}."
        )


def check_flag(argument: str, value: Any) -> None:
    """Check an option that is on or off."""
    if not isinstance(value, bool):
        raise ValueError(f"Argument '{argument}' must be True or False, got {value!r}.")


def check_initial_factors(value: Any) -> None:
    """Check the constructor's `initial_factors`."""
    if value not in ("identity", "gradient"):
        raise ValueError(
            "Argument 'initial_factors' must be 'identity' or 'gradient', got "
            f"{value!r}."
        )


def check_exponent(value: Any) -> None:
    """Check the constructor's `exponent`."""
    if isinstance(value, bool) or value not in EXPONENTS:
        raise ValueError(f"Argument 'exponent' must be in {EXPONENTS}, got {value!r}.")


def check_limit(argument: str, value: Any) -> None:
    """Check a limit, or None."""
    if value is not None:
        _positive(argument, value)


def check_count(argument: str, value: Any) -> None:
    """Check a number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"Argument '{argument}' must be an integer > 0, got {value!r}."
        )


def check_adamw(*, lr: Any, betas: Any, weight_decay: Any) -> None:
    """Check what one gives AdamW."""
    _above_0("lr", lr)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Argument 'betas' must be two numbers, got {betas!r}.")
    for beta in betas:
        _fractions("betas", beta)
    if weight_decay is not None:
        _non_negative("weight_decay", weight_decay)


def check_rule(rule: PreconditionerGroup) -> None:
    """Check that a rule can do without a model."""
    if rule.NEEDS_MODEL:
        raise ValueError(
            "Argument 'combine_params' must hold rules that need no model, such as "
            "PerParameter, if parameters stand in the place of 'model', got "
            f"{type(rule).__name__}."
        )


def check_parameter(name: str, parameter: Tensor) -> None:
    """Check that a parameter is of a type that can be trained."""
    if parameter.dtype not in SUPPORTED_DTYPES:
        raise ValueError(
            f"Argument 'params' must hold parameters of types "
            f"{list(SUPPORTED_DTYPES)}, got {parameter.dtype} for {name!r}."
        )


def _of_axes(argument: str, specification: Any, ndim: int) -> tuple[Any, ...]:
    """Return the entry of each axis of a tensor with `ndim` axes."""
    entries = specification
    if isinstance(specification, Mapping):
        if ndim not in specification:
            raise ValueError(
                f"Argument '{argument}' must have an entry for tensors with {ndim} "
                f"axes, got {specification!r}."
            )
        entries = specification[ndim]
    if not isinstance(entries, (tuple, list)):
        return (entries,) * ndim
    if len(entries) != ndim:
        raise ValueError(
            f"Argument '{argument}' must have {ndim} entries for a tensor with {ndim} "
            f"axes, got {entries!r}."
        )
    return tuple(entries)


def structures_of_axes(specification: Any, ndim: int) -> tuple[str, ...]:
    """Return the structure of each axis of a tensor with `ndim` axes.

    Raises:
        ValueError: If the specification does not say it.
    """
    return _of_axes("structures", specification, ndim)


def dtypes_of_axes(
    specification: Any, ndim: int, default: torch.dtype
) -> tuple[torch.dtype, ...]:
    """Return the factors' type for each axis of a tensor with `ndim` axes.

    Raises:
        ValueError: If the specification does not say it.
    """
    entries = _of_axes("preconditioner_dtypes", specification, ndim)
    return tuple(default if entry is None else entry for entry in entries)
