"""Tensors that are distributed over a mesh of devices: DTensor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sirfshampoo._distributed.groups import awaiting

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs


def is_dtensor(tensor: Any) -> TypeIs[DTensor]:
    """Return whether a tensor is distributed over a mesh of devices."""
    # the module takes a second to load; while nobody has, there are none
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the shard of a tensor that lies on this rank; of a plain one: itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()


def placement(tensor: Tensor) -> Any:
    """Return a key that is equal for tensors that are distributed alike."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def _behind_rows(placements: Sequence[Placement]) -> list[Placement]:
    """Return placements of tensors as those of their stack along a new first axis."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    shifted: list[Placement] = []
    for each in placements:
        if isinstance(each, _StridedShard):
            factor = each.split_factor
            shifted.append(_StridedShard(each.dim + 1, split_factor=factor))
        else:
            shifted.append(Shard(each.dim + 1) if isinstance(each, Shard) else each)
    return shifted


def distributed_like(rows: Tensor, like: Tensor) -> Tensor:
    """Return the shard of a tensor as what it is part of.

    Args:
        rows: What `local` returns of a tensor.
        like: A tensor of the same shape that is distributed in the same way.
    """
    if not is_dtensor(like):
        return rows
    return like.from_local(
        rows,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def local_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, distributed as another is.

    Ranks communicate if it is distributed differently, e.g. a gradient that is still
    to be summed.

    Args:
        tensor: A tensor, plain or distributed.
        like: A tensor of the same shape: how it is to be distributed, if at all.
    """
    if is_dtensor(like) and placement(tensor) != placement(like):
        tensor = tensor.redistribute(like.device_mesh, like.placements)  # type: ignore[attr-defined]
    return local(tensor)


def whole_rows(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return whole tensors, stacked: one collective for all of them.

    Args:
        tensors: Tensors of one shape, plain or distributed, ``[*shape]`` each.
        like: A tensor of that shape: how they are distributed, if they are.

    Returns:
        The stack ``[rows, *shape]`` on every rank.
    """
    shards = [local_like(t, like) for t in tensors]
    rows = shards[0].unsqueeze(0) if len(shards) == 1 else torch.stack(shards)
    return whole_stack(rows, like)


def whole_stack(rows: Tensor, like: Tensor) -> Tensor:
    """Return whole tensors, ``[rows, *shape]``, on every rank.

    Args:
        rows: What of them lies here, ``[rows, *local shape]``.
        like: A tensor ``[*shape]``: how they are distributed, if they are.
    """
    if not is_dtensor(like):
        return rows
    shape = len(rows), *like.shape
    stack = like.from_local(
        rows,
        like.device_mesh,
        _behind_rows(like.placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )
    with awaiting("shards of tensors"):
        return stack.full_tensor()


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on every rank."""
    return whole_rows([tensor], tensor).squeeze(0) if is_dtensor(tensor) else tensor


def shard_rows(rows: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shards of whole tensors, without communication.

    Args:
        rows: Whole tensors, ``[rows, *shape]``, equal on all ranks.
        like: A tensor ``[*shape]``: how they are to be distributed, if at all.

    Returns:
        The stack of shards, ``[rows, *local shape]``.
    """
    if not is_dtensor(like):
        return rows
    from torch.distributed.tensor import Replicate

    mesh = like.device_mesh
    replicated = [Replicate()] * mesh.ndim
    whole = like.from_local(rows, mesh, replicated, run_check=False)
    return whole.redistribute(mesh, _behind_rows(like.placements)).to_local()


def sum_over_shards(shares: Tensor, like: Tensor) -> Tensor:
    """Add up what each shard of a tensor contributes; where it is whole, nothing.

    Args:
        shares: This rank's contribution, of any shape.
        like: The tensor.
    """
    if not is_dtensor(like):
        return shares
    from torch.distributed.tensor import Partial, Replicate

    placements = [
        Replicate() if p.is_replicate() else Partial() for p in like.placements
    ]
    sums = like.from_local(shares, like.device_mesh, placements, run_check=False)
    with awaiting("sums over shards"):
        return sums.full_tensor()


def fill(target: Tensor, source: Tensor) -> None:
    """Copy numbers into a tensor, whichever of the two are distributed.

    Ranks communicate if they are distributed differently.
    """
    if placement(target) == placement(source):
        local(target).copy_(local(source))
        return
    whole = whole_rows([source], source)
    local(target).copy_(shard_rows(whole.to(target.device), target).squeeze(0))
