"""Where tensors lie among the ranks, and what ranks tell each other."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement
    from typing_extensions import TypeIs


# --- DTensor --------------------------------------------------------------------------
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


def whole_rows(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Return whole tensors, stacked: one collective for all of them.

    Args:
        tensors: Tensors of one shape, plain or distributed, ``[*shape]`` each.
        like: A tensor of that shape: how they are distributed, if they are.

    Returns:
        The stack ``[rows, *shape]`` on every rank.
    """
    if not is_dtensor(like):
        stacked = [local(t) for t in tensors]
        return stacked[0].unsqueeze(0) if len(stacked) == 1 else torch.stack(stacked)
    mesh, shape = like.device_mesh, (len(tensors), *like.shape)
    shards = [
        local(
            t
            if placement(t) == placement(like)
            else t.redistribute(mesh, like.placements)  # type: ignore[attr-defined]
        )
        for t in tensors
    ]
    rows = shards[0].unsqueeze(0) if len(shards) == 1 else torch.stack(shards)
    return like.from_local(
        rows,
        mesh,
        _behind_rows(like.placements),
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    ).full_tensor()


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


def fill(target: Tensor, source: Tensor) -> None:
    """Copy numbers into a tensor, whichever of the two are distributed.

    Ranks communicate if they are distributed differently.
    """
    if placement(target) == placement(source):
        local(target).copy_(local(source))
        return
    whole = whole_rows([source], source)
    local(target).copy_(shard_rows(whole.to(target.device), target).squeeze(0))


# --- what all ranks know --------------------------------------------------------------
@contextmanager
def awaiting(what: str) -> Iterator[None]:
    """Name what was awaited where a collective fails or times out.

    Raises:
        RuntimeError: In place of what the collective raised.
    """
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"SIRFShampoo awaited {what} from the other ranks, in vain: one of them "
            "has died, hangs, or does not take this step. It waited no longer than the "
            f"timeout of the process group. {error}"
        ) from error


def check_process_group(group: Any) -> None:
    """Check the constructor's `process_group`."""
    if group is None or group is False:
        return
    if not dist.is_available() or not (
        isinstance(group, dist.ProcessGroup) or _is_mesh(group)
    ):
        raise ValueError(
            "Argument 'process_group' must be a torch.distributed process group, a "
            "DeviceMesh, None (all ranks) or False (none but this one), got "
            f"{group!r}."
        )


def _is_mesh(group: Any) -> TypeIs[DeviceMesh]:
    module = sys.modules.get("torch.distributed.device_mesh")
    return module is not None and isinstance(group, module.DeviceMesh)


def is_initialized() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The ranks that see different examples of the same training.

    Before each step they agree on what each of them must know alike: how many examples
    there were, and which pre-conditioners have gradients on every rank.
    """

    def __init__(self, group: Any, model: Module | None) -> None:
        """Take what the user gave; by default, ask the model, then take all ranks.

        Args:
            group: A process group, a mesh, None (by default) or False (no ranks).
            model: The model; one that is wrapped in ``DistributedDataParallel`` knows
                its process group.
        """
        check_process_group(group)
        if group is None and isinstance(model, DistributedDataParallel):
            group = model.process_group
        self._group = group
        self._meshes: list[DeviceMesh] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return this: a copy of an optimizer is on the same ranks."""
        return self

    def know(self, params: Iterable[Tensor]) -> None:
        """Take note of where the parameters lie."""
        meshes = {p.device_mesh: None for p in params if is_dtensor(p)}
        self._meshes = list(meshes)

    def _data_groups(self) -> list[ProcessGroup]:
        """Return the groups over which, one after the other, examples are summed."""
        if self._group is False or not is_initialized():
            return []
        groups = _groups_of(dist.group.WORLD if self._group is None else self._group)
        return [group for group in groups if dist.get_world_size(group) > 1]

    def _other_groups(self, data: Sequence[ProcessGroup]) -> list[ProcessGroup]:
        """Return groups of ranks that share parameters, but are not asked in `data`."""
        if len(data) == 1:
            known = set(dist.get_process_group_ranks(data[0]))
        elif _is_mesh(self._group):
            known = set(self._group.mesh.flatten().tolist())
        else:
            known = set()
        others = [
            m for m in self._meshes if not known >= set(m.mesh.flatten().tolist())
        ]
        return [g for m in others for g in _groups_of(m) if dist.get_world_size(g) > 1]

    def agree(self, present: list[bool], count: int | None) -> tuple[list[bool], int]:
        """Return what all ranks know alike.

        Args:
            present: Whether each unit has gradients on this rank.
            count: The number of examples on this rank; None if it is known anyway.

        Returns:
            Whether each unit has gradients on all ranks, and the sum of the examples.
        """
        data = self._data_groups()
        if count is None and not self._meshes:
            data = []  # nobody depends on anybody
        others = self._other_groups(data)
        if not data and not others:
            return present, count or 0
        with awaiting("batch size and missing gradients"):
            told = _reduced([count or 0, *present], data, dist.ReduceOp.SUM)
            ranks = _product(dist.get_world_size(group) for group in data)
            everywhere = [number == ranks for number in told[1:]]
            if others:
                everywhere = [
                    bool(n) for n in _reduced(everywhere, others, dist.ReduceOp.MIN)
                ]
        return everywhere, told[0]


def _product(numbers: Iterable[int]) -> int:
    result = 1
    for number in numbers:
        result *= number
    return result


def _groups_of(group: Any) -> list[ProcessGroup]:
    """Return the groups of a mesh, one a dimension, or the group itself."""
    if not _is_mesh(group):
        return [group]
    return [group.get_group(dim) for dim in range(group.ndim)]


def _reduced(
    numbers: Sequence[int], groups: Sequence[ProcessGroup], operation: Any
) -> list[int]:
    """Return integers reduced over groups, one after the other."""
    for group in groups:
        tensor = torch.tensor(numbers, dtype=torch.int64, device=device_of(group))
        dist.all_reduce(tensor, operation, group)
        numbers = tensor.tolist()
    return list(numbers)


def device_of(group: ProcessGroup) -> torch.device:
    """Return where tensors must lie for a group; on the CPU if it can."""
    # such as "cpu:gloo,cuda:nccl"
    devices = [p.split(":")[0] for p in dist.get_backend_config(group).split(",")]
    return torch.device("cpu" if "cpu" in devices else devices[0])
