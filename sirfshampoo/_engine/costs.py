"""What a pre-conditioner costs: bytes and floating-point operations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Size

from sirfshampoo._distributed import is_dtensor, local
from sirfshampoo._engine.units import Unit
from sirfshampoo.structures import StructuredMatrix, structure_class
from sirfshampoo.structures.base import accumulation_dtype

#: How many steps a kept K Kᵀ is taken to serve if the interval is a callable.
_GUESSED_INTERVAL = 10


def interval_of(group: Mapping[str, Any]) -> int:
    """Return how many steps the factors of a group are expected to stay."""
    T = group["T"]
    if not callable(T):
        return int(T)
    longest = getattr(T, "T", None)  # as GrowingInterval tells it
    return longest if isinstance(longest, int) else _GUESSED_INTERVAL


def period_of(group: Mapping[str, Any]) -> int:
    """Return in how many steps the factors of a group are updated at most once."""
    T = group["T"]
    return 1 if callable(T) else int(T)


def squaring_pays(
    structure: type[StructuredMatrix],
    dtype: torch.dtype,
    dim: int,
    columns: int,
    interval: int,
) -> bool:
    """Return whether K Kᵀ costs less than what it saves until K changes.

    Multiplying a matrix onto K costs its stored numbers times the columns of the
    other: for K Kᵀ, K's numbers a row; for the gradient, its columns in each step.

    Args:
        structure: The structure of K.
        dtype: The data type of K.
        dim: The number of rows of K.
        columns: The number of columns of the unfolded gradient.
        interval: How many steps K stays.
    """
    outer = structure.outer_structure(dim, dtype)
    if outer is None or (outer is not structure and interval > 1):
        return False  # what is kept must not be larger than the factors
    return outer.num_stored(dim) <= dim * columns * interval


@dataclass(frozen=True)
class Cost:
    """What one pre-conditioner costs.

    Attributes:
        axis_bytes: The bytes of each axis' factor and its momentum.
        kept_bytes: The bytes of what is kept of K Kᵀ between updates of the factors.
        update_flops: The operations of an update of the factors.
        step_flops: The operations of pre-conditioning a gradient.
    """

    axis_bytes: tuple[int, ...]
    kept_bytes: int
    update_flops: int
    step_flops: int


def cost_of(unit: Unit, group: Mapping[str, Any]) -> Cost:
    """Return what a unit costs under the options of its group."""
    return _cost(
        unit.dims,
        unit.structures,
        unit.dtypes,
        unit.times,
        unit.powers,
        normalizes=unit.variant.normalize_update,
        has_m=bool(group["alpha2"]),
        damped=bool(group["lam"]),
        interval=interval_of(group),
    )


@cache
def _cost(
    dims: Size,
    structures: tuple[str, ...],
    dtypes: tuple[torch.dtype, ...],
    times: tuple[int, ...],
    powers: tuple[float, ...],
    *,
    normalizes: bool,
    has_m: bool,
    damped: bool,
    interval: int,
) -> Cost:
    axis_bytes: list[int] = []
    kept_bytes = update_flops = step_flops = 0
    elementwise = all(name == "diagonal" for name in structures)
    axes = zip(dims, structures, dtypes, times, powers, strict=True)
    for dim, name, dtype, t, power in axes:
        structure, columns = structure_class(name), dims.numel() // max(dim, 1)
        stored = structure.num_stored(dim)
        axis_bytes.append(stored * dtype.itemsize * (2 if has_m else 1))
        if elementwise:  # squares once; for each axis, sums of them and a product
            update_flops += 2 * dims.numel() + 8 * dim
            step_flops += dims.numel() + dim
            continue
        product = structure.flops(dim, columns, dtype)  # with an unfolded gradient
        # A, H, Kᵀ K and K m, of symmetric factors also m K
        among = (2 if damped else 1) + (1 if t == 1 else 0)
        update_flops += 2 * product + among * _among(structure, dim)

        outer = structure.outer_structure(dim, dtype)
        if t == 2 and squaring_pays(structure, dtype, dim, columns, interval) and outer:
            step_flops += outer.flops(dim, columns, dtype)
            if interval == 1:
                step_flops += _among(outer, dim)
            else:
                update_flops += _among(outer, dim)
                kept_bytes += outer.num_stored(dim) * dtype.itemsize
        else:
            step_flops += t * product
            if interval > 1 and dtype == torch.float16:
                kept_bytes += stored * dtype.itemsize
        if interval > 1 and (dtype == torch.float16 or power):
            kept_bytes += accumulation_dtype(dtype).itemsize  # its scale
    if elementwise:
        update_flops += dims.numel()
    if normalizes and len(dims) > 1:  # U Uᵀ, or Uᵀ U
        step_flops += 2 * dims.numel() * min(dims[0], dims[1:].numel())
    return Cost(tuple(axis_bytes), kept_bytes, update_flops, step_flops)


def _among(structure: type[StructuredMatrix], dim: int) -> int:
    """Return the operations of a product of two matrices of one structure."""
    return structure.flops(dim, -(-structure.num_stored(dim) // max(dim, 1)))


def counter_bytes(unit: Unit, *, held: bool = True) -> int:
    """Return the bytes of what is counted for a unit on this rank.

    Args:
        unit: The unit.
        held: Whether the factors lie here; if not, there is `step` alone.
    """
    step = skipped = torch.int64.itemsize
    if not held:
        return step
    norms = accumulation_dtype(unit.params[0].dtype).itemsize  # their mean and count
    return step + skipped + (2 * norms if unit.variant.follow_gradient else 0)


def momentum_bytes(unit: Unit, group: Mapping[str, Any], *, held: bool = True) -> int:
    """Return the bytes of the momentum buffers of a unit's parameters on this rank.

    Args:
        unit: The unit.
        group: Its parameter group.
        held: Whether the factors lie here; if not, whole momenta do not, either.
    """
    if not group["alpha1"]:
        return 0
    lie_here = [p for p in unit.params if held or is_dtensor(p)]
    return sum(local(p).numel() * p.element_size() for p in lie_here)
