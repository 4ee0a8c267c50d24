"""Parameter groups as they were given, before each became one a unit."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from copy import deepcopy
from typing import Any

from torch import Tensor

from sirfshampoo._config.groups import ALIASES, OPTIONS, check_options, own_interval

#: What holds for a whole group; structures, types and rules are each unit's own.
_SHARED = tuple(
    name
    for name in OPTIONS
    if name not in ("structures", "preconditioner_dtypes", "combine_params")
)


class GivenGroup(MutableMapping[str, Any]):
    """A view of all parameter groups that one given group became.

    Reading an option gives the value that they share, writing sets it in all of them.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        """View groups of units."""
        self._groups = groups

    def __getitem__(self, key: str) -> Any:
        """Return an option, or under ``'params'`` the parameters.

        Raises:
            KeyError: If there is no such option.
            ValueError: If the groups differ in it.
        """
        if key == "params":
            return [p for group in self._groups for p in group["params"]]
        key = ALIASES.get(key, key)
        if key not in _SHARED:
            raise KeyError(key)
        self._check_not_empty(key)
        first, *others = [group[key] for group in self._groups]
        alike = all(map(callable, [first, *others]))  # each group has a copy
        if not alike and any(value != first for value in others):
            told = list(dict.fromkeys(map(str, [first, *others])))
            raise ValueError(
                f"The groups must share a value of '{key}' to be read as one, got "
                f"{', '.join(told)}."
            )
        return first

    def _check_not_empty(self, key: str) -> None:
        """Check that there are groups, which have options."""
        if not self._groups:
            raise ValueError(
                f"The group must have parameters to have an option '{key}': it was "
                "given without any."
            )

    def __setitem__(self, key: str, value: Any) -> None:
        """Set an option in all groups.

        Raises:
            ValueError: If the value is wrong, or the option cannot be changed.
        """
        key = ALIASES.get(key, key)
        if key not in _SHARED:
            raise ValueError(f"Argument '{key}' must be in {_SHARED} to be set here.")
        check_options({key: value})
        self._check_not_empty(key)
        for group in self._groups:
            if isinstance(group[key], Tensor):  # where a captured CUDA graph looks
                group[key].fill_(float(value))
            else:
                group[key] = own_interval(value) if key == "T" else deepcopy(value)

    def __delitem__(self, key: str) -> None:
        """Refuse: a group has all its options."""
        raise TypeError(f"The option '{key}' can be set, not deleted.")

    def __iter__(self) -> Iterator[str]:
        """Yield the keys."""
        return iter(("params", *_SHARED))

    def __len__(self) -> int:
        """Return the number of keys."""
        return 1 + len(_SHARED)
