"""Which part of a distributed tensor each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sirfshampoo._distributed.shards import placement

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Region:
    """The part of a tensor that a rank has.

    Attributes:
        slices: Where it is in the whole tensor.
        shape: Its shape.
        sends: Whether this rank, of those that have it, sends it.
    """

    slices: tuple[slice, ...]
    shape: torch.Size
    sends: bool


def _parts(tensor: DTensor, coordinate: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return start and length, a axis, of the shard at a place in the mesh."""
    parts = [(0, size) for size in tensor.shape]
    for each, ranks, index in zip(
        tensor.placements, tensor.device_mesh.mesh.shape, coordinate, strict=True
    ):
        if each.is_replicate():
            continue
        dim = getattr(each, "dim", None)
        if dim is None or type(each).__name__ != "Shard":
            raise ValueError(
                "Argument 'shard_preconditioners' must be False for parameters that "
                f"are neither sharded nor replicated, got the placement {each!r}."
            )
        start, size = parts[dim]
        chunk = -(-size // ranks)
        first = min(index * chunk, size)
        parts[dim] = start + first, min(chunk, size - first)
    return tuple(parts)


class Regions:
    """The parts of tensors that the ranks of a group have; found once a placement."""

    def __init__(self, ranks: Sequence[int]) -> None:
        """Know nothing at first.

        Args:
            ranks: The global ranks of the group.
        """
        self._ranks = ranks
        self._known: dict[Any, list[Region]] = {}

    def of(self, p: DTensor) -> list[Region]:
        """Return the part of a tensor that each rank has.

        Raises:
            ValueError: If these ranks do not hold all of it.
        """
        key = placement(p), p.shape
        if key in self._known:
            return self._known[key]
        mesh, seen = p.device_mesh.mesh, set()
        regions = []
        for rank in self._ranks:
            places = (mesh == rank).nonzero().tolist()
            parts = _parts(p, places[0]) if places else tuple((0, 0) for _ in p.shape)
            shape = torch.Size(size for _, size in parts)
            slices = tuple(slice(start, start + size) for start, size in parts)
            sends = shape.numel() > 0 and bool(places) and parts not in seen
            seen.add(parts)
            regions.append(Region(slices, shape, sends))
        if sum(r.shape.numel() for r in regions if r.sends) != p.numel():
            raise ValueError(
                "Argument 'shard_preconditioners' must name ranks that together hold "
                f"all parameters, got {self._ranks} for one on {p.device_mesh}: pass "
                "the mesh, or its group, on which they are sharded."
            )
        self._known[key] = regions
        return regions
