"""What stands in for NCCL refuses what NCCL would refuse."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sirfshampoo._distributed import groups
from tests.distributed import nccl_cases as cases
from tests.distributed.as_nccl import AsNccl, can_all_end
from tests.distributed.ranks import Ranks
from tests.distributed.test_distributed import OWNED, WAYS, two  # noqa: F401 - a fixture


def a_type_that_nccl_lacks() -> None:
    """Integers of two bytes."""
    dist.broadcast(torch.ones(2, dtype=torch.int16, device="cpu"), 0, async_op=True)


def objects() -> None:
    """A collective of objects, which are measured on the device first."""
    dist.all_gather_object([None, None], "a")


def objects_of_our_own() -> None:
    """The same between CPUs, where each step would pickle."""
    dist.all_gather_object([None, None], "a", groups.twin_of(dist.group.WORLD))


def no_device() -> None:
    """A tensor that does not lie where the parameters do."""
    dist.broadcast(torch.ones(2), 0, async_op=True)


def a_view() -> None:
    """What does not lie in one piece."""
    dist.broadcast(torch.ones(2, 2, device="cpu").mT, 0, async_op=True)


def never_awaited() -> None:
    """Work that nobody waits for."""
    dist.broadcast(torch.ones(2, device="cpu"), 0, async_op=True).wait()
    dist.broadcast(torch.ones(2, device="cpu"), 0, async_op=True)


def reused() -> None:
    """Memory that is written while it is sent."""
    send = torch.ones(2, device="cpu")
    work = dist.all_to_all_single(
        torch.empty(2, device="cpu"), send, group=dist.group.WORLD, async_op=True
    )
    send.zero_()
    work.wait()


FAULTS = {
    a_type_that_nccl_lacks: "cannot send torch.int16",
    objects: "objects wait for the device",
    objects_of_our_own: "within a step",
    no_device: "made on no device",
    a_view: "sends what is contiguous",
    never_awaited: "not awaited",
    reused: "reused while it is sent",
}


def commit(fault: Callable[[], None], told: str) -> None:
    """Do what is wrong."""
    with pytest.raises(AssertionError, match=told), AsNccl():
        fault()
    dist.barrier()


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(two: Ranks, fault: Callable[[], None]) -> None:  # noqa: F811
    two.run(commit, fault=fault, told=FAULTS[fault])


def what_is_right() -> None:
    """Calls that differ between ranks, or in their order, and those that do not."""
    rank, checker = dist.get_rank(), AsNccl()
    with checker:
        for _ in range(2):
            told = groups.reduced([rank, 1], [dist.group.WORLD], dist.ReduceOp.SUM)
        assert told == [1, 2]
        dist.broadcast(torch.ones(2, device="cpu"), 0, async_op=True).wait()
    checker.compare()
    checker.seen.reverse()
    if rank == 0:
        checker.seen.reverse()
    with pytest.raises(AssertionError, match="in a circle"):
        checker.compare()
    other = AsNccl()
    with other:
        dist.broadcast(torch.ones(2, device="cpu"), 0, async_op=True).wait()
    name, ranks, call = other.seen.pop()
    other.seen.append((name, ranks, call.replace("2", "3") if rank else call))
    with pytest.raises(AssertionError, match="other calls"):
        other.compare()


def test_what_is_right_passes(two: Ranks) -> None:  # noqa: F811
    two.run(what_is_right)


def test_orders_that_wait_in_a_circle() -> None:
    a, b, c = ("a", 0), ("b", 0), ("c", 0)
    orders: list[list[Any]] = [[a, b], [b, c], [c, a]]
    assert not can_all_end(orders)
    orders[2].reverse()
    assert can_all_end(orders)


@pytest.mark.parametrize("error", groups._OF_THE_DEVICE)
def test_what_the_device_lacks_is_not_told_of_other_ranks(
    error: type[RuntimeError],
) -> None:
    with pytest.raises(error, match=r"^full$"), groups.awaiting("gradients"):
        raise error("full")
    told = pytest.raises(RuntimeError, match="awaited gradients")
    with told, groups.awaiting("gradients"):
        raise RuntimeError("timed out")


@WAYS
@OWNED
@pytest.mark.parametrize("options", ["joined, T=2", "momentum first"])
def test_no_step_waits_for_a_device(
    two: Ranks,  # noqa: F811
    options: str,
    way: str,
    owned: bool,
) -> None:
    two.run(cases.without_a_wait, options=options, way=way, owned=owned)


@pytest.mark.parametrize("case", [cases.without_anything_in_hand, cases.sent_elsewhere])
def test_case(two: Ranks, case: Callable[[], None]) -> None:  # noqa: F811
    two.run(case)
