"""Checks of single values: each names the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite
from numbers import Real
from typing import Any

from torch import Tensor

Check = Callable[[str, Any], None]


def real_number(rule: str, allowed: Callable[[float], bool]) -> Check:
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


def one_of(*allowed: Any) -> Check:
    """Return the check of a value that must be among a few."""
    names = list(map(repr, allowed))
    rule = f"{', '.join(names[:-1])} or {names[-1]}"

    def check(argument: str, value: Any) -> None:
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"Argument '{argument}' must be {rule}, got {value!r}.")

    return check


def or_none(check: Check) -> Check:
    """Return the check of a value that may be None."""

    def check_if_given(argument: str, value: Any) -> None:
        if value is not None:
            check(argument, value)

    return check_if_given


def check_flag(argument: str, value: Any) -> None:
    """Check what is on or off."""
    if not isinstance(value, bool):
        raise ValueError(f"Argument '{argument}' must be True or False, got {value!r}.")


def check_count(argument: str, value: Any) -> None:
    """Check a number of things."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"Argument '{argument}' must be an integer > 0, got {value!r}."
        )


check_non_negative = real_number("a finite number >= 0", lambda x: x >= 0)
check_positive = real_number("a finite number > 0", lambda x: x > 0)
check_limit = or_none(real_number("None or a finite number > 0", lambda x: x > 0))
check_fraction = real_number("a number in [0, 1)", lambda x: 0 <= x < 1)
check_fractions = real_number("numbers in [0, 1)", lambda x: 0 <= x < 1)
