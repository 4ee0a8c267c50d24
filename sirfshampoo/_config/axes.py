"""What is given for each axis of a tensor: structures and types of factors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch

from sirfshampoo.structures import structure_class

#: 'dense1024', of an axis of length d: 'dense' if d ≤ 128, or if d ≤ 1024 and d ≤ 2 ×
#: the length of the tensor's other axes together; 'diagonal' if d ≥ 16 × 1024; else
#: dense blocks of 128.
_LIMITED = re.compile("dense([1-9][0-9]*)")

#: The length of blocks. Shorter axes cost calls, not operations, whatever they have.
_BLOCK = 128

#: Axes of more than so many times the others together: there a factor costs more than
#: all else, and one gradient fills few of its directions.
_LONG = 2

#: Axes of so many times the longest dense one: neighbours there are strangers to each
#: other, such as the words of a vocabulary.
_STRANGERS = 16

SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_structure(argument: str, name: Any) -> None:
    """Check the name of a structure."""
    if not isinstance(name, str):
        raise ValueError(f"Argument '{argument}' must name structures, got {name!r}.")
    try:
        structure_class(_of_axis(name, 0, others=0))
    except ValueError as error:
        raise ValueError(
            f"Argument '{argument}' must name supported structures. {error} "
            "'dense<size>' is 'dense' up to a size, in blocks or diagonal beyond."
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


def check_axes(argument: str, value: Any) -> None:
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


def structures_of_axes(specification: Any, dims: Sequence[int]) -> tuple[str, ...]:
    """Return the structure of each axis of a tensor of a shape.

    Raises:
        ValueError: If the specification does not say it.
    """
    names = _of_axes("structures", specification, len(dims))
    numel = prod(dims)
    return tuple(
        _of_axis(name, dim, others=numel // max(dim, 1))
        for name, dim in zip(names, dims, strict=True)
    )


def _of_axis(name: str, dim: int, others: int) -> str:
    """Return the structure of an axis by a name that may depend on its length.

    Args:
        name: The name.
        dim: The length of the axis.
        others: That of the tensor's other axes together, their product.
    """
    limited = _LIMITED.fullmatch(name)
    if limited is None:
        return name
    longest = int(limited[1])
    block = min(_BLOCK, longest)
    if dim <= max(block, min(longest, _LONG * others)):
        return "dense"
    return f"block{block}diagonal" if dim < _STRANGERS * longest else "diagonal"


def dtypes_of_axes(
    specification: Any, ndim: int, default: torch.dtype
) -> tuple[torch.dtype, ...]:
    """Return the factors' type for each axis of a tensor with `ndim` axes.

    Raises:
        ValueError: If the specification does not say it.
    """
    entries = _of_axes("preconditioner_dtypes", specification, ndim)
    return tuple(default if entry is None else entry for entry in entries)
