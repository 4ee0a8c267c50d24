"""The options of a parameter group: the documented ones, and what others call them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from inspect import ismethod
from typing import Any

from torch import Tensor

from sirfshampoo._config.axes import check_axes
from sirfshampoo._config.checks import (
    Check,
    check_fraction,
    check_non_negative,
)
from sirfshampoo._config.variant import Variant
from sirfshampoo.combiner import PreconditionerGroup

#: What other optimizers call things, and what to write here.
_FOREIGN = {
    "momentum": "'alpha1'",
    "betas": "'alpha1' for the momentum, 'beta2' for the factors' learning rate",
    "eps": "'lam'",
    "damping": "'lam'",
}

#: Arguments of the constructor that hold for all parameters.
_OF_ALL = {
    "batch_size",
    "verbose_init",
    "process_group",
    "shard_preconditioners",
    *Variant.names(),
}


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


_CHECKS: dict[str, Check] = {
    "lr": check_non_negative,
    "beta2": check_non_negative,
    "alpha1": check_fraction,
    "alpha2": check_fraction,
    "lam": check_non_negative,
    "kappa": check_non_negative,
    "T": _check_T,
    "structures": check_axes,
    "preconditioner_dtypes": check_axes,
    "combine_params": _check_rules,
}

#: The options of a parameter group.
OPTIONS = tuple(_CHECKS)

#: What schedulers that cycle the momentum call ``alpha1``.
CYCLED_MOMENTUM = "momentum"

#: What schedulers write into a group, and what it is called here.
ALIASES = {CYCLED_MOMENTUM: "alpha1", "weight_decay": "kappa"}

#: The options that are numbers; of these, the learning rate may stay a tensor.
NUMBERS = ("lr", "beta2", "alpha1", "alpha2", "lam", "kappa")


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
    tensors = {n: group[n] for n in NUMBERS if isinstance(group.get(n), Tensor)}
    return {name: tensor.item() for name, tensor in tensors.items()}


def are_aliases_in(groups: Iterable[Mapping[str, Any]]) -> bool:
    """Return whether others have written anything into groups."""
    return any([not ALIASES.keys().isdisjoint(group) for group in groups])


def aliases_in(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return what others have written into a group under their own names."""
    return {name: group[name] for name in ALIASES if name in group}


def adopt_aliases(
    groups: Sequence[dict[str, Any]], before: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Set the options of groups to what others have written under their own names.

    Args:
        groups: The groups.
        before: What `aliases_in` said of them last: only what has changed since is
            adopted, so that what a user writes holds until a scheduler writes again.

    Returns:
        What it says now.

    Raises:
        ValueError: If a value is wrong; nothing is changed then.
    """
    found = list(map(aliases_in, groups))
    news = [
        {k: v for k, v in now.items() if v is not None and v != last.get(k)}
        for now, last in zip(found, [*before, *[{}] * len(found)], strict=False)
    ]
    for new in news:
        for name, value in new.items():
            _CHECKS[ALIASES[name]](name, value)
    for group, new in zip(groups, news, strict=True):
        group |= {ALIASES[name]: float(value) for name, value in new.items()}
    return found


def own_interval(T: Any) -> Any:
    """Return a ``T`` for one group alone, since a callable may hold state.

    A method stays with its object.

    Raises:
        ValueError: If it cannot be copied.
    """
    if not callable(T) or ismethod(T):
        return T
    try:
        return deepcopy(T)
    except Exception as error:
        raise ValueError(
            "Argument 'T' must be a callable that can be copied for each "
            f"pre-conditioner, got {T!r}: {error}"
        ) from error


def with_kappa(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group's options with ``weight_decay``, torch's name, as ``kappa``.

    Of a group that was rewritten, which has all options, what schedulers have written
    beside is left out.

    Raises:
        ValueError: If both are there and differ.
    """
    named = dict(options)
    if named.keys() >= set(OPTIONS):
        return {key: value for key, value in named.items() if key not in ALIASES}
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
