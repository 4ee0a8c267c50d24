"""What stacks were built from, and whether that still stands: a few comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any

from sirfshampoo._engine.units import Unit

_kind = attrgetter("device", "dtype")
_fixed = itemgetter("structures", "preconditioner_dtypes")


class Snapshot:
    """Parameters and state as they were.

    Attributes:
        params: The parameters of all units.
    """

    def __init__(self, units: Sequence[Unit], state: Mapping[Any, Any]) -> None:
        """Note what there is.

        Args:
            units: The units.
            state: The optimizer's state.
        """
        self.params = [p for unit in units for p in unit.params]
        self._fixed = [(unit.structures, unit.dtypes) for unit in units]
        self._kinds = list(map(_kind, self.params))
        self._owners = list(state)
        self._entries = list(_entries(state))

    def are_in(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether groups hold these very parameters, and what is fixed."""
        return list(map(_fixed, groups)) == self._fixed and _are_same(
            chain.from_iterable([group["params"] for group in groups]), self.params
        )

    def is_of(self, state: Mapping[Any, Any]) -> bool:
        """Return whether a state holds these very tensors, for parameters as before."""
        return (
            _are_same(state, self._owners)
            and _are_same(_entries(state), self._entries)
            and list(map(_kind, self.params)) == self._kinds
        )


def _entries(state: Mapping[Any, Any]) -> Iterable[Any]:
    """Return all that is in a state; others than parameters may hold anything."""
    return chain.from_iterable(
        [e.values() if isinstance(e, Mapping) else (e,) for e in state.values()]
    )


def _are_same(found: Iterable[Any], known: Sequence[Any]) -> bool:
    """Return whether the same objects come in the same order."""
    end = (None,)
    return all(map(is_, chain(found, end), chain(known, end)))
