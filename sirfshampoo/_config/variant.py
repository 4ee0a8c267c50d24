"""The options that hold for all parameters, as one thing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from sirfshampoo._config.checks import (
    Check,
    check_count,
    check_flag,
    check_limit,
    one_of,
    or_none,
)


def _option(default: Any, check: Check) -> Any:
    """Return a field with a default and the check of its values."""
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The options beyond the documented ones; see the constructor's arguments.

    A new option is a field here, and an argument of the constructor with its text.

    Raises:
        ValueError: If a value is wrong.
    """

    spread_updates: bool = _option(False, check_flag)
    initial_factors: str = _option("identity", one_of("identity", "gradient"))
    exponent: float = _option(1.0, one_of(0.5, 0.75, 1.0))
    momentum_first: bool = _option(False, check_flag)
    nesterov: bool = _option(False, check_flag)
    normalize_update: bool = _option(False, check_flag)
    follow_gradient: bool = _option(False, check_flag)
    max_relative_update: float | None = _option(None, check_limit)
    clamp: str = _option("frobenius", one_of("frobenius", "spectral"))
    relative_damping: bool = _option(False, check_flag)
    cautious_decay: bool = _option(False, check_flag)
    decay_vectors: bool = _option(True, check_flag)
    allow_closure: bool = _option(False, check_flag)
    expected_batch_size: int | None = _option(None, or_none(check_count))

    def __post_init__(self) -> None:
        """Check all values."""
        for option in fields(self):
            option.metadata["check"](option.name, getattr(self, option.name))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the options."""
        return tuple(option.name for option in fields(cls))
