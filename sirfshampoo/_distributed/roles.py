"""Which ranks see different examples, as parameters and their meshes tell."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from sirfshampoo._distributed.groups import groups_of
from sirfshampoo._distributed.shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

#: Integers in whose place numbers of so many bytes may be read.
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def data_groups(
    params: Sequence[DTensor], model: Module | None
) -> list[ProcessGroup] | None:
    """Return the groups over which, one after the other, examples are summed.

    FSDP2 replicates and shards along the first axes of a mesh, and each of its ranks
    sees other examples. On all other axes, and where parameters are distributed without
    it, they see the same: as by tensor parallelism.

    Args:
        params: The distributed parameters.
        model: The model, whose modules know whether FSDP2 shards them.

    Returns:
        The groups; None if parameters do not tell.
    """
    managed = _managed(model)
    found: dict[frozenset[int], list[ProcessGroup]] = {}
    for mesh, placements in {
        (p.device_mesh, p.placements) for p in params if id(p) in managed
    }:
        sharded = [
            dim for dim, each in enumerate(placements) if not each.is_replicate()
        ]
        dims = range((sharded[0] if sharded else mesh.ndim - 1) + 1)
        here = mesh.get_coordinate() or [0] * mesh.ndim
        at = tuple(slice(None) if d in dims else here[d] for d in range(mesh.ndim))
        ranks = frozenset(mesh.mesh[at].flatten().tolist())
        found[ranks] = [mesh.get_group(dim) for dim in dims]
    if not found:  # of other ranks than those that share parameters, nothing is known
        world = dist.get_world_size()
        return [] if all(p.device_mesh.size() == world for p in params) else None
    if len(found) > 1:
        return None
    ((ranks, groups),) = found.items()
    return (
        groups_of(dist.group.WORLD) if len(ranks) == dist.get_world_size() else groups
    )


def _managed(model: Module | None) -> set[int]:
    """Return the identities of the parameters that FSDP2 manages."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or model is None:
        return set()
    modules = (m for m in model.modules() if isinstance(m, fsdp.FSDPModule))
    return {id(p) for module in modules for p in module.parameters()}


def digest(params: Iterable[Tensor]) -> int:
    """Return a number that differs where whole parameters do."""
    number = 0
    for i, p in enumerate(params):
        if not is_dtensor(p) and not p.is_meta:
            bits = p.detach().view(_INTEGERS[p.element_size()])
            number += (i + 1) * int(bits.sum(dtype=torch.int64)) + sum(p.shape)
    return number % (1 << 62)
