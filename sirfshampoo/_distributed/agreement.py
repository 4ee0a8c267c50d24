"""What all ranks must know alike before a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch.distributed as dist
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel

from sirfshampoo._distributed.exchange import Exchange
from sirfshampoo._distributed.groups import (
    awaiting,
    groups_of,
    is_initialized,
    is_mesh,
    ranks_of,
    reduced,
    refuse_join,
    refuse_zero,
)
from sirfshampoo._distributed.roles import data_groups, digest
from sirfshampoo._distributed.shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def check_process_group(group: Any) -> None:
    """Check the constructor's `process_group`."""
    if group is None or group is False:
        return
    if not dist.is_available() or not (
        isinstance(group, dist.ProcessGroup) or is_mesh(group)
    ):
        raise ValueError(
            "Argument 'process_group' must be a torch.distributed process group, a "
            "DeviceMesh, None (all ranks) or False (none but this one), got "
            f"{group!r}."
        )


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
        if is_initialized():
            refuse_zero()
        if group is None and isinstance(model, DistributedDataParallel):
            group = model.process_group
        self._group = group
        self._model = None if model is None else ref(model)
        self._partners: list[ProcessGroup | DeviceMesh] = []
        # where nobody named a group: what the parameters tell (None: all ranks),
        # whether they are to be compared for it, and whether they do not tell
        self._read: list[ProcessGroup] | None = None
        self._is_checked = self._is_unclear = False
        self._is_heard = False  # whether what one rank tells is known to reach all

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        """Return this: a copy of an optimizer is on the same ranks."""
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: groups cannot travel, so it means all ranks."""
        group = False if self._group is False else None
        return {**vars(Ranks(group, None)), "_is_checked": self._is_checked}

    def sharing(self, group: Any) -> Any:
        """Return the ranks that share pre-conditioners.

        Args:
            group: What the user gave; True means these ranks.

        Raises:
            ValueError: If these are none, or on a mesh of several dimensions.
        """
        if group is not True or self._group is None:
            return group
        if self._group is False or len(groups_of(self._group)) > 1:
            raise ValueError(
                "Argument 'shard_preconditioners' must name the ranks, a process group "
                "or a DeviceMesh of one dimension, where 'process_group' is False or a "
                f"mesh of several dimensions, got True with {self._group!r}."
            )
        return self._group

    def depend(self, params: Iterable[Tensor], owners: Exchange | None) -> None:
        """Take note of which ranks this one needs in a step.

        Args:
            params: The parameters, each on all ranks of its mesh.
            owners: Between whom pre-conditioners are shared, if they are.

        Raises:
            ValueError: If shards lie elsewhere than their mesh: torch would move what
                stands beside them in the state.
        """
        shards = [p for p in params if is_dtensor(p)]
        for p in shards:
            if p.device.type not in ("meta", p.device_mesh.device_type):
                raise ValueError(
                    "Argument 'params' must hold shards on the devices of their mesh, "
                    f"{p.device_mesh.device_type}, got a parameter of shape "
                    f"{tuple(p.shape)} with shards on {p.device.type}, as FSDP2's "
                    "CPUOffloadPolicy leaves them. Use fully_shard without it, and "
                    "shard_preconditioners=True to save memory."
                )
        meshes: dict[Any, None] = {p.device_mesh: None for p in shards}
        self._partners = [*meshes, *([] if owners is None else [owners.group])]
        if self._group is None and is_initialized():
            model = None if self._model is None else self._model()
            self._read = data_groups(shards, model) if shards else None
            if shards:
                self._is_checked, self._is_unclear = True, self._read is None

    def _data_groups(self) -> list[ProcessGroup]:
        """Return the groups over which, one after the other, examples are summed."""
        if self._group is False or not is_initialized():
            return []
        found = dist.group.WORLD if self._group is None else self._group
        groups = groups_of(found) if self._read is None else self._read
        return [group for group in groups if dist.get_world_size(group) > 1]

    def _other_groups(self, data: Sequence[ProcessGroup]) -> list[ProcessGroup]:
        """Return groups of partners of which some are not asked in `data`."""
        known: set[int] = set()
        if is_mesh(self._group) or len(data) == 1:
            known = ranks_of(self._group if is_mesh(self._group) else data[0])
        others = [group for group in self._partners if not known >= ranks_of(group)]
        groups = [part for group in others for part in groups_of(group)]
        return [group for group in groups if dist.get_world_size(group) > 1]

    def _check(self, params: Iterable[Tensor]) -> None:
        """Check that it is known which ranks see other examples.

        Raises:
            ValueError: If they hold different parameters, or those do not tell.
        """
        if self._group is not None or not is_initialized():
            return
        if not self._is_checked:  # once: whole parameters are equal where DDP trains
            self._is_checked = True
            number = digest(params)
            with awaiting("a digest of the parameters"):
                most, least = reduced(
                    [number, -number], groups_of(dist.group.WORLD), dist.ReduceOp.MAX
                )
            self._is_unclear = most != -least
        if self._is_unclear:
            raise ValueError(
                "Argument 'process_group' must name the ranks that see different "
                "examples, where ranks hold different parameters and neither "
                "DistributedDataParallel nor FSDP2 tells, got None. It is False if "
                "this rank sees all examples of its parameters; or pass 'batch_size' "
                "as an integer, that of all ranks."
            )

    def _check_heard(self, groups: Sequence[ProcessGroup]) -> None:
        """Check, once, that ranks which have to agree hear of the same ranks.

        What they tell goes along one group after the other. On a grid, and where groups
        hold each other, it reaches all.

        Raises:
            ValueError: If groups overlap otherwise.
        """
        if self._is_heard:
            return
        world = range(dist.get_world_size())
        own = [int(rank == dist.get_rank()) for rank in world]
        heard = reduced(own, groups, dist.ReduceOp.MAX)
        heard += [-number for number in heard]
        if reduced(heard, groups, dist.ReduceOp.MIN) != heard:
            found = [dist.get_process_group_ranks(group) for group in groups]
            raise ValueError(
                "Arguments 'process_group' and 'shard_preconditioners' must name ranks "
                "that form a grid, or of which one holds the other, together with the "
                f"meshes of parameters, got {found}: these would not agree."
            )
        self._is_heard = True

    def agree(
        self, present: list[bool], count: int | None, params: Iterable[Tensor]
    ) -> tuple[list[bool], int]:
        """Return what all ranks know alike.

        Args:
            present: Whether each unit has gradients on this rank.
            count: The number of examples on this rank; None if it is known anyway.
            params: The parameters.

        Returns:
            Whether each unit has gradients on all ranks, and the sum of the examples.

        Raises:
            ValueError: If examples are counted, and it is not known on which ranks; or
                if some ranks would not hear of all on which they depend.
            RuntimeError: If ranks take different numbers of steps, as far as is known.
        """
        if count is not None:
            self._check(params)
        data = self._data_groups()
        if count is None and not self._partners:
            data = []  # nobody depends on anybody
        others = self._other_groups(data)
        if not data and not others:
            return present, count or 0
        refuse_join(None if self._model is None else self._model())
        with awaiting("batch size and missing gradients"):
            self._check_heard([*data, *others])
            told = reduced([count or 0, *present], data, dist.ReduceOp.SUM)
            ranks = prod(dist.get_world_size(group) for group in data)
            everywhere = [number == ranks for number in told[1:]]
            if others:
                everywhere = [
                    bool(n) for n in reduced(everywhere, others, dist.ReduceOp.MIN)
                ]
        return everywhere, told[0]
