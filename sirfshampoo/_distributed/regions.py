"""Which part of a distributed tensor each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sirfshampoo._distributed.groups import awaiting, reduced
from sirfshampoo._distributed.shards import placement

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
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


def _parts(
    tensor: DTensor, coordinate: Sequence[int], name: str
) -> list[tuple[int, int]]:
    """Return start and length, a axis, of the shard at a place in the mesh."""
    parts, cuts = [(0, size) for size in tensor.shape], [1] * tensor.ndim
    shape = tensor.device_mesh.mesh.shape
    axes = list(zip(tensor.placements, shape, coordinate, strict=True))
    # a strided shard is part of what those to its right leave
    axes.sort(key=lambda axis: hasattr(axis[0], "split_factor"))
    for each, ranks, index in axes:
        if each.is_replicate():
            continue
        dim = getattr(each, "dim", None)
        if dim is None or getattr(each, "split_factor", cuts[dim]) != cuts[dim]:
            raise ValueError(
                "Argument 'shard_preconditioners' must be False for parameters that "
                f"are neither sharded nor replicated, got {each!r} of {name}."
            )
        start, size = parts[dim]
        chunk = -(-size // ranks)
        first = min(index * chunk, size)
        parts[dim] = start + first, min(chunk, size - first)
        cuts[dim] *= ranks
    return parts


class Regions:
    """The parts of tensors that the ranks of a group have; found once a placement."""

    def __init__(self, group: ProcessGroup) -> None:
        """Know nothing at first."""
        self._group = group
        self._known: dict[Any, list[Region]] = {}

    def of(self, p: DTensor, name: str = "a parameter") -> list[Region]:
        """Return the part of a tensor that each rank has.

        The first time, the ranks tell each other: what lies on a part of a mesh, as
        what FSDP2 alone shards beside tensor parallelism, has another mesh elsewhere.

        Args:
            p: The tensor.
            name: What to call it where it cannot be.

        Raises:
            ValueError: If these ranks do not hold all of it.
        """
        key = placement(p), p.shape
        if key not in self._known:
            self._known[key] = self._ask(p, name)
        return self._known[key]

    def _ask(self, p: DTensor, name: str) -> list[Region]:
        """Gather the parts of all ranks."""
        here = p.device_mesh.get_coordinate()
        own = _parts(p, here or [0] * p.device_mesh.ndim, name)
        if here is None:
            own = [(0, 0)] * p.ndim
        rank, size = dist.get_rank(self._group), dist.get_world_size(self._group)
        told = [[0] * (2 * p.ndim) for _ in range(size)]
        told[rank] = [number for part in own for number in part]
        with awaiting("where shards lie"):
            flat = reduced(
                [number for numbers in told for number in numbers],
                [self._group],
                dist.ReduceOp.SUM,
            )
        regions: list[Region] = []
        seen = set()
        for rank in range(size):
            parts = flat[2 * p.ndim * rank :][: 2 * p.ndim]
            starts, sizes = parts[::2], parts[1::2]
            shape = torch.Size(sizes)
            slices = tuple(slice(a, a + n) for a, n in zip(starts, sizes, strict=True))
            sends = shape.numel() > 0 and tuple(parts) not in seen
            seen.add(tuple(parts))
            regions.append(Region(slices, shape, sends))
        if sum(r.shape.numel() for r in regions if r.sends) != p.numel():
            ranks = dist.get_process_group_ranks(self._group)
            raise ValueError(
                "Argument 'shard_preconditioners' must name ranks that together hold "
                f"all parameters, got {ranks} for {name} on {p.device_mesh}: pass the "
                "mesh, or its group, on which they are sharded."
            )
        return regions
