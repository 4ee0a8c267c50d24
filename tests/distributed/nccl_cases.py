"""What the tests of NCCL's demands run on every rank, with gloo in its place."""

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils._python_dispatch import _disable_current_modes

from sirfshampoo._distributed import Exchange, agreement, groups, regions
from sirfshampoo._engine import stacks
from sirfshampoo._method import device
from tests.conftest import NoLooking
from tests.distributed.distributed_cases import (
    batches,
    make_model,
    maker,
    mean_loss,
    share,
    wrapped,
)


def without_a_wait(options: str, way: str, owned: bool) -> None:
    """In a step, the host looks at no number but those that hosts tell each other."""
    tell = groups.reduced

    def reduced(*args: Any) -> list[int]:
        with _disable_current_modes():
            return tell(*args)

    with ExitStack() as patches:
        for module in (agreement, regions):
            patches.enter_context(patch.object(module, "reduced", reduced))
        patches.enter_context(patch.object(device, "is_at_hand", lambda _: False))
        patches.enter_context(patch.object(stacks, "_STACK_LIMIT", {}))
        model = wrapped(way, make_model())
        optimizer = maker(options)(model, shard_preconditioners=owned)
        for x, y in batches(5):
            optimizer.zero_grad()
            mean_loss(model, share(x), share(y)).backward()
            with NoLooking():
                optimizer.step()
        assert optimizer.global_step == 5


def without_anything_in_hand() -> None:
    """A rank that neither sends nor gets takes part where the parameters are."""
    mesh = init_device_mesh("cpu", (2,))
    exchange = Exchange(mesh)
    rows = 1 - dist.get_rank()  # the second rank has an empty shard
    p = DTensor.from_local(
        torch.empty(rows, 4, device="meta"),
        mesh,
        [Shard(0)],
        shape=(1, 4),
        stride=(4, 1),
    )
    seen: list[torch.device] = []

    def take_note(*buffers: Any, **_: Any) -> None:
        seen.extend(t.device for t in buffers if isinstance(t, Tensor))

    exchange.check([("p", p)])
    send = dist.all_to_all_single
    dist.all_to_all_single = take_note
    try:
        exchange.to_owners([(0, p, p.to_local().unsqueeze(0))])
        results = [torch.empty(1, 1, 4, device="meta")][dist.get_rank() :]
        exchange.from_owners([(0, [p])], results)
    finally:
        dist.all_to_all_single = send
    assert seen == [torch.device("meta")] * 4


def sent_elsewhere() -> None:
    """What a group cannot send goes by one of our own."""
    world = groups.groups_of(dist.group.WORLD)[0]
    cpu = torch.device("cpu")
    assert groups.serving(world, cpu) is world
    mine = torch.full((3,), float(dist.get_rank()))
    with patch.object(groups, "_devices_of", lambda _: ["cuda"]):
        assert groups.serving(world, torch.device("cuda")) is world
        assert groups.serving(world, cpu) is not world
        Exchange(dist.group.WORLD).broadcast([(1, mine)])()
    assert mine.tolist() == [1.0] * 3
