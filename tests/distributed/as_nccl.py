"""Refuses what NCCL would refuse, or would hang on, in steps on ranks that use gloo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, Self
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sirfshampoo._distributed import groups

TYPES = {
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.bool,
}
"""What NCCL can send."""

OBJECTS = ("all_gather_object", "broadcast_object_list", "gather_object")
OBJECTS += ("scatter_object_list", "send_object_list", "recv_object_list")

Event = tuple[str, int]
"""A group, and the number of a collective in it."""


class AsNccl(TorchDispatchMode):
    """Looks at the collectives of this rank; `compare` then at those of all.

    A group of our own may send between CPUs, and no other. That tensors do not lie on
    the CPU by mistake is seen on a CPU, too: what says no device is made on "meta".
    """

    def __init__(self, *, in_step: bool = True) -> None:
        """Have seen nothing.

        Args:
            in_step: Whether objects are refused in groups of our own, too.
        """
        super().__init__()
        self._in_step = in_step
        self.seen: list[tuple[str, tuple[int, ...], str]] = []
        self._open: Counter[str] = Counter()
        self._work: list[AwaitedWork] = []
        self._patches = ExitStack()

    # ------------------------------------------------------------------- on this rank

    def __enter__(self) -> Self:
        """Look from now on."""
        for name in OBJECTS:
            send = self._without_objects(getattr(dist, name))
            self._patches.enter_context(patch.object(dist, name, send))
        for name in ("all_to_all_single", "broadcast"):
            send = getattr(dist, name)
            self._patches.enter_context(patch.object(dist, name, self._watched(send)))
        self._patches.enter_context(torch.device("meta"))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Look no more; all must have been awaited."""
        super().__exit__(*error)
        self._patches.close()
        if error[0] is None:
            assert all(work.is_awaited for work in self._work), "Work is not awaited."
            assert not +self._open, "Work is not awaited."
        self._work.clear()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Look at collectives; all else passes."""
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # to see what becomes of its shards
        name = str(func)
        if "c10d" in name:
            self._check(name, [*args, *(kwargs or {}).values()])
        return func(*args, **(kwargs or {}))

    def _check(self, name: str, args: list[Any]) -> None:
        if "wait_tensor" in name:
            self._open["functional"] -= 1
        if "wait_tensor" in name or "wrap_tensor" in name:
            return
        self._open["functional"] += "functional" in name
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        group = group_of(args)
        ranks = tuple(dist.get_process_group_ranks(group))
        label = "ours" if group in ours() else dist.get_backend(group)
        kinds = sorted({str(t.dtype) for t in tensors})
        for t in tensors:
            assert t.dtype in TYPES, f"NCCL cannot send {t.dtype}."
            assert t.is_contiguous(), f"NCCL sends what is contiguous: {name}."
            assert not t.is_meta, f"A tensor for {name} was made on no device."
        sizes = (
            ""
            if "alltoall" in name or "all_to_all" in name
            else str(sorted(t.numel() for t in tensors))
        )
        self.seen.append(
            (f"{label} {group.group_name}", ranks, f"{name} {kinds} {sizes}")
        )

    def _watched(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective that remembers what it is to send, until awaited."""

        def watched(*args: Any, **kwargs: Any) -> Any:
            assert kwargs.get("async_op"), "A collective that blocks."
            out = [t for t in args[:2] if isinstance(t, Tensor)]
            work = send(*args, **kwargs)
            # of all_to_all_single, the second is sent; of broadcast, the owner's
            sends = out[1:] or [t for t in out if args[1] == dist.get_rank()]
            self._work.append(AwaitedWork(work, sends))
            return self._work[-1]

        return watched

    def _without_objects(self, send: Callable[..., Any]) -> Callable[..., Any]:
        """Return a collective of objects that is refused where a device sends them."""

        def sent(*args: Any, **kwargs: Any) -> Any:
            is_ours = any(g is a for g in ours() for a in (*args, *kwargs.values()))
            assert is_ours, f"{send.__name__}: objects wait for the device."
            assert not self._in_step, f"{send.__name__} within a step."
            return send(*args, **kwargs)

        return sent

    # ------------------------------------------------------------------- on all ranks

    def compare(self) -> None:
        """Check that all ranks made the same calls in an order that cannot deadlock."""
        of_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_rank, self.seen)
        calls: dict[str, dict[int, list[str]]] = {}
        orders = []
        for rank, seen in enumerate(of_rank):
            order: list[Event] = []
            for group, ranks, call in seen:
                assert rank in ranks
                key = f"{group} of {ranks}"
                mine = calls.setdefault(key, {r: [] for r in ranks})[rank]
                order.append((key, len(mine)))
                mine.append(call)
            orders.append(order)
        for group, of_ranks in calls.items():
            first, *others = of_ranks.values()
            for other in others:
                assert other == first, f"Ranks make other calls in {group}."
        assert can_all_end(orders), "Ranks wait for each other in a circle."


class AwaitedWork:
    """Work under way; what it sends must not change until it is awaited."""

    def __init__(self, work: Any, sends: list[Tensor]) -> None:
        """Watch work."""
        self._work, self._sends = work, sends
        self._copies = [t.clone() for t in sends]
        self.is_awaited = False

    def wait(self) -> Any:
        """Wait, and compare."""
        self.is_awaited = True
        for t, copy in zip(self._sends, self._copies, strict=True):
            same = (t == copy) | (t.isnan() & copy.isnan())
            assert same.all(), "Memory is reused while it is sent."
        return self._work.wait()


def can_all_end(orders: list[list[Event]]) -> bool:
    """Return whether ranks that each keep an order of collectives come to an end."""
    places = [0] * len(orders)
    takes_part = Counter(event for order in orders for event in set(order))
    moved = True
    while moved:
        heads = [o[i] for o, i in zip(orders, places, strict=True) if i < len(o)]
        ready = {e for e, n in Counter(heads).items() if n == takes_part[e]}
        moved = bool(ready)
        for rank, order in enumerate(orders):
            if places[rank] < len(order) and order[places[rank]] in ready:
                places[rank] += 1
    return all(i == len(order) for i, order in zip(places, orders, strict=True))


def ours() -> list[Any]:
    """Return the groups of our own."""
    return [g for twins in groups._TWINS.values() for g in twins.values()]


def group_of(args: list[Any]) -> Any:
    """Return the group that a collective is given, itself or by name."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject):
            with suppress(RuntimeError):  # what a reduction does is one, too
                return dist.ProcessGroup.unbox(arg)
        if (
            isinstance(arg, str)
            and arg in dist.distributed_c10d._world.pg_names.values()
        ):
            return dist.distributed_c10d._resolve_process_group(arg)
    raise AssertionError(f"A collective without a group: {args}.")
