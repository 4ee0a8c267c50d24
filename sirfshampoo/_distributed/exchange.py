"""Tensors on their way between the rank that owns something and all the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from sirfshampoo._distributed.groups import (
    awaiting,
    groups_of,
    is_mesh,
    serving,
    twin_of,
)
from sirfshampoo._distributed.regions import Regions
from sirfshampoo._distributed.shards import is_dtensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


Waiting = Callable[[], list[list[Tensor]]]
Kind = tuple[torch.dtype, torch.device]


class Exchange:
    """Moves tensors between the ranks that own something and all the others.

    Each call starts one collective for each type of number, and returns a function
    that waits for it. All ranks must make the same calls in the same order.

    Attributes:
        group: The ranks.
        size: The number of ranks.
        rank: This one.
    """

    def __init__(self, group: Any) -> None:
        """Exchange among the ranks of a process group or of a one-dimensional mesh."""
        self.group = _only_group(group)
        self.size = dist.get_world_size(self.group)
        self.rank = dist.get_rank(self.group)
        self._regions = Regions(self.group)
        self._mesh: DeviceMesh | None = None

    def check(self, params: Iterable[tuple[str, Tensor]]) -> None:
        """Check that these ranks together hold the parameters, given with their names.

        Raises:
            ValueError: If they do not.
        """
        for name, p in params:
            if is_dtensor(p):
                self._regions.of(p, name)

    # ----------------------------------------------------------------- of parameters

    def to_owners(
        self, wanted: Sequence[tuple[int, Tensor, Tensor]], what: str = "gradients"
    ) -> Callable[[], list[Tensor]]:
        """Bring shards of tensors to owners.

        Args:
            wanted: Owners, each with a sharded parameter, and tensors that are sharded
                as it is, what of them lies here: ``[rows, *local shape]``.
            what: The name of what is sent.

        Returns:
            What waits for whole tensors, ``[rows, *shape]``, of what this rank owns.
        """
        send: list[list[Tensor]] = [[] for _ in range(self.size)]
        expect: list[list[tuple[torch.Size, Tensor]]] = [[] for _ in range(self.size)]
        for owner, like, shards in wanted:
            regions = self._regions.of(like)  # type: ignore[arg-type]
            if regions[self.rank].sends:
                send[owner].append(shards)
            if owner == self.rank:
                for rank, region in enumerate(regions):
                    if region.sends:
                        shape = torch.Size((len(shards), *region.shape))
                        expect[rank].append((shape, shards))
        kinds = _kinds(shards for _, _, shards in wanted)
        arrive = self._all_to_all(send, expect, kinds, what)

        def wait() -> list[Tensor]:
            pieces = [iter(of_rank) for of_rank in arrive()]
            wholes = []
            for owner, like, shards in wanted:
                if owner == self.rank:
                    G = shards.new_empty(len(shards), *like.shape)
                    for rank, region in enumerate(self._regions.of(like)):  # type: ignore[arg-type]
                        if region.sends:
                            G[:, *region.slices] = next(pieces[rank])
                    wholes.append(G)
            return wholes

        return wait

    def from_owners(
        self,
        wanted: Sequence[tuple[int, Sequence[Tensor]]],
        mine: Sequence[Tensor],
    ) -> Callable[[], list[Tensor]]:
        """Send whole tensors to where the shards of parameters are.

        Args:
            wanted: Owners, each with sharded parameters of equal shape.
            mine: What this rank owns, ``[rows, *shape]``.

        Returns:
            What waits for the shards on this rank, ``[rows, *local shape]``.
        """
        send: list[list[Tensor]] = [[] for _ in range(self.size)]
        expect: list[list[tuple[torch.Size, Tensor]]] = [[] for _ in range(self.size)]
        own = iter(mine)
        for owner, params in wanted:
            regions = self._regions.of(params[0])  # type: ignore[arg-type]
            shape = torch.Size((len(params), *regions[self.rank].shape))
            expect[owner].append((shape, params[0]))
            if owner == self.rank:
                U = next(own)
                for rank, region in enumerate(regions):
                    send[rank].append(U[:, *region.slices])
        kinds = _kinds(params[0] for _, params in wanted)
        arrive = self._all_to_all(send, expect, kinds, "updates")

        def wait() -> list[Tensor]:
            pieces = [iter(of_owner) for of_owner in arrive()]
            return [next(pieces[owner]) for owner, _ in wanted]

        return wait

    def broadcast(self, moved: Sequence[tuple[int, Tensor]]) -> Callable[[], None]:
        """Send tensors from their owners to all ranks.

        Each rank receives what it does not own, and no more; all of it is in flight
        at once.

        Args:
            moved: Owners, each with a tensor that has the same shape on every rank.

        Returns:
            What waits for them, and writes them into the tensors.
        """
        handles = []
        for kind in _kinds(t for _, t in moved):
            for owner in sorted({owner for owner, _ in moved}):
                tensors = [
                    t.detach() for o, t in moved if o == owner and _kind(t) == kind
                ]
                length = sum(t.numel() for t in tensors)
                if length and self.size > 1:
                    if owner == self.rank:
                        flat = torch.cat([t.flatten() for t in tensors])
                    else:
                        flat = tensors[0].new_empty(length)
                    source = dist.get_global_rank(self.group, owner)
                    with awaiting("parameters"):
                        group = serving(self.group, flat.device)
                        work = dist.broadcast(flat, source, group, async_op=True)
                    handles.append((work, flat, tensors, owner))

        def finish() -> None:
            for work, flat, tensors, owner in handles:
                with awaiting("parameters"):
                    work.wait()
                if owner != self.rank:
                    parts = flat.split([t.numel() for t in tensors])
                    pairs = zip(parts, tensors, strict=True)
                    news = [part.view(t.shape) for part, t in pairs]
                    torch._foreach_copy_(tensors, news)

        return finish

    def _all_to_all(
        self,
        send: Sequence[Sequence[Tensor]],
        expect: Sequence[Sequence[tuple[torch.Size, Tensor]]],
        kinds: Sequence[Kind],
        what: str,
    ) -> Waiting:
        """Send tensors to each rank.

        Args:
            send: For each rank, what it gets.
            expect: For each rank, the shapes of what it sends, each with a tensor of
                its type and device.
            kinds: All types that any rank sends, and where: a rank that has nothing
                to send or to get takes part there.
            what: The name of what is sent.

        Returns:
            What waits for the tensors of each rank.
        """
        handles = []
        for kind in kinds:
            parts = [[t for t in ts if _kind(t) == kind] for ts in send]
            shapes = [[s for s, t in ts if _kind(t) == kind] for ts in expect]
            flat = [t.flatten() for ts in parts for t in ts]
            empty = torch.empty(0, dtype=kind[0], device=kind[1])
            outgoing = torch.cat([empty, *flat])
            to = [sum(t.numel() for t in ts) for ts in parts]
            come = [sum(s.numel() for s in ss) for ss in shapes]
            incoming = outgoing.new_empty(sum(come))
            with awaiting(what):
                group = serving(self.group, kind[1])
                work = dist.all_to_all_single(
                    incoming, outgoing, come, to, group, async_op=True
                )
            handles.append((work, incoming, come, shapes, kind, outgoing))

        def wait() -> list[list[Tensor]]:
            arrived: list[dict[Kind, Iterator[Tensor]]]
            arrived = [{} for _ in range(self.size)]
            for work, incoming, come, shapes, kind, _ in handles:
                with awaiting(what):
                    work.wait()
                for rank, buffer in enumerate(incoming.split(come)):
                    numbers = [shape.numel() for shape in shapes[rank]]
                    pairs = zip(buffer.split(numbers), shapes[rank], strict=True)
                    arrived[rank][kind] = iter([t.view(shape) for t, shape in pairs])
            return [
                [next(arrived[rank][_kind(like)]) for _, like in expect[rank]]
                for rank in range(self.size)
            ]

        return wait

    # ---------------------------------------------------------------- of checkpoints

    def copied(self, owned: Sequence[tuple[int, Tensor, bool]]) -> list[Tensor]:
        """Return tensors that one rank each holds; see `shared` for `owned`."""
        tensors = [t if held else t.new_empty(t.shape[1:]) for _, t, held in owned]
        self.broadcast([(o, t) for (o, _, _), t in zip(owned, tensors, strict=True)])()
        return tensors

    def shared(self, owned: Sequence[tuple[int, Tensor, bool]]) -> list[Tensor]:
        """Return tensors that one rank each holds, sharded along their first axes.

        A tensor without axes comes whole.

        Args:
            owned: Owners, each with a tensor, and whether this rank holds it; if not,
                there is one without rows, ``[0, *shape]``.
        """
        send: list[list[Tensor]] = [[] for _ in range(self.size)]
        expect: list[list[tuple[torch.Size, Tensor]]] = [[] for _ in range(self.size)]
        shapes = [t.shape if held else t.shape[1:] for _, t, held in owned]
        for (owner, tensor, held), shape in zip(owned, shapes, strict=True):
            cuts = [_part(shape, rank, self.size) for rank in range(self.size)]
            if held:
                for rank in range(self.size):
                    send[rank].append(tensor[cuts[rank]] if shape else tensor)
            part = cuts[self.rank]
            length = (part.stop - part.start,) if shape else ()
            expect[owner].append((torch.Size((*length, *shape[1:])), tensor))
        kinds = _kinds(tensor for _, tensor, _ in owned)
        arrive = self._all_to_all(send, expect, kinds, "the state")
        pieces = [iter(of_owner) for of_owner in arrive()]
        return [
            self._as_shard(next(pieces[owner]).clone(), shape)
            for (owner, _, _), shape in zip(owned, shapes, strict=True)
        ]

    def _as_shard(self, part: Tensor, shape: torch.Size) -> Tensor:
        """Return what a part along the first axis is part of."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Shard

        if not shape:
            return part
        if self._mesh is None:
            self._mesh = DeviceMesh.from_group(self.group, part.device.type)
        return DTensor.from_local(
            part,
            self._mesh,
            [Shard(0)],
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def joined(self, told: dict[str, float]) -> dict[str, float]:
        """Return what all ranks tell, each of what it owns."""
        of_rank: list[Any] = [None] * self.size
        with awaiting("diagnostics"):
            dist.all_gather_object(of_rank, told, twin_of(self.group))
        return {key: value for told in of_rank for key, value in told.items()}


def check_sharing(group: Any) -> None:
    """Check the constructor's `shard_preconditioners`."""
    if isinstance(group, bool) or (is_mesh(group) and group.ndim == 1):
        return
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise ValueError(
            "Argument 'shard_preconditioners' must be True (all ranks), False, a "
            "torch.distributed process group, or a DeviceMesh of one dimension, got "
            f"{group!r}."
        )


def _only_group(group: Any) -> ProcessGroup:
    """Return the group that is given, or that of a mesh of one dimension."""
    if group is True:
        group = dist.group.WORLD
    found: ProcessGroup = groups_of(group)[0]
    return found


def _part(shape: torch.Size, rank: int, size: int) -> slice:
    """Return which part along the first axis a rank gets, as torch cuts it."""
    length = shape[0] if shape else 0
    chunk = -(-length // size)
    return slice(min(rank * chunk, length), min((rank + 1) * chunk, length))


def _kind(tensor: Tensor) -> Kind:
    """Return what the tensors of one collective have in common."""
    return tensor.dtype, tensor.device


def _kinds(tensors: Iterable[Tensor]) -> list[Kind]:
    """Return all types and devices of tensors, as they come, on every rank alike."""
    return list(dict.fromkeys(map(_kind, tensors)))
