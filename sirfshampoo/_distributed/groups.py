"""Groups of ranks, and what to say when one of them does not answer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from typing_extensions import TypeIs


#: Errors that say nothing of other ranks; torch before 2.8 lacks the second.
_OF_THE_DEVICE = (
    torch.OutOfMemoryError,
    getattr(torch, "AcceleratorError", torch.OutOfMemoryError),
)


@contextmanager
def awaiting(what: str) -> Iterator[None]:
    """Name what was awaited where a collective fails or times out.

    Raises:
        RuntimeError: In place of what the collective raised. What this rank's device
            lacks or refuses passes as it is.
    """
    try:
        yield
    except _OF_THE_DEVICE:
        raise
    except RuntimeError as error:
        raise RuntimeError(
            f"SIRFShampoo awaited {what} from the other ranks, in vain: one of them "
            "has died, hangs, or does not take this step. It waited no longer than the "
            f"timeout of the process group. {error}"
        ) from error


def refuse_zero() -> None:
    """Refuse to be built by torch's ``ZeroRedundancyOptimizer``.

    It deals out parameters by itself, and copies options between groups one to one,
    which a group for each pre-conditioner does not allow.

    Raises:
        ValueError: If it is under way.
    """
    if _is_under_way("torch.distributed.optim.zero_redundancy_optimizer"):
        raise ValueError(
            "ZeroRedundancyOptimizer cannot deal out SIRFShampoo. Build it directly: "
            "SIRFShampoo(model, shard_preconditioners=True) shares pre-conditioners, "
            "their memory and their work among the ranks."
        )


def refuse_join(model: Any) -> None:
    """Refuse to agree where some ranks take fewer steps, in torch's ``Join``.

    Args:
        model: The model; one wrapped in ``DistributedDataParallel`` knows of it.

    Raises:
        RuntimeError: If it is there.
    """
    if getattr(getattr(model, "_join_config", None), "enable", False):
        raise RuntimeError(
            "SIRFShampoo cannot count examples, nor share pre-conditioners, where "
            "torch's Join lets ranks take different numbers of steps: what is agreed "
            "on in each step would be awaited from ranks that have ended. Give all "
            "ranks as many batches (DistributedSampler does); or pass 'batch_size' as "
            "an integer, with shard_preconditioners=False."
        )


def refuse_trainer() -> None:
    """Refuse to own pre-conditioners of whole parameters in transformers' ``Trainer``.

    It asks one rank alone for the state, and that rank would wait for the others.

    Raises:
        ValueError: If it is under way.
    """
    if _is_under_way("transformers.trainer"):
        raise ValueError(
            "Argument 'shard_preconditioners' must be False where transformers' "
            "Trainer trains by DistributedDataParallel: it saves the state of rank 0 "
            "alone, which does not have what other ranks own. Or have the Trainer "
            "shard parameters, too (TrainingArguments(fsdp=...), version 2): then all "
            "ranks save."
        )


def _is_under_way(module: str) -> bool:
    """Return whether a function of a module has called, by whatever way."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == module:
            return True
    return False


def is_mesh(group: Any) -> TypeIs[DeviceMesh]:
    module = sys.modules.get("torch.distributed.device_mesh")
    return module is not None and isinstance(group, module.DeviceMesh)


def is_initialized() -> bool:
    """Return whether this process is one of several ranks."""
    return dist.is_available() and dist.is_initialized()


def groups_of(group: Any) -> list[ProcessGroup]:
    """Return the groups of a mesh, one a dimension, or the group itself."""
    if not is_mesh(group):
        return [group]
    return [group.get_group(dim) for dim in range(group.ndim)]


def ranks_of(group: Any) -> set[int]:
    """Return the ranks of a mesh or of a group."""
    if is_mesh(group):
        return set(group.mesh.flatten().tolist())
    return set(dist.get_process_group_ranks(group))


def reduced(
    numbers: Sequence[int], groups: Sequence[ProcessGroup], operation: Any
) -> list[int]:
    """Return integers reduced over the ranks of groups, one after the other."""
    for group in groups:
        twin = twin_of(group)
        tensor = torch.tensor(numbers, dtype=torch.int64, device=_device_of(twin))
        dist.all_reduce(tensor, operation, twin)
        numbers = tensor.tolist()
    return list(numbers)


#: The groups of our own, by their ranks, of each default group.
_TWINS: WeakKeyDictionary[ProcessGroup, dict[tuple[int, ...], ProcessGroup]]
_TWINS = WeakKeyDictionary()


def twin_of(group: ProcessGroup) -> ProcessGroup:
    """Return a group of our own with the ranks of another, made when first asked for.

    What the ranks tell each other before a step meets nothing else there: where one of
    them leaves a step out, the others wait in vain, and say so, while in the group of
    the gradients one would take its next gradients for it. On the CPU by gloo, which
    tells of failures and lets no device wait; where torch lacks it, as the other.
    """
    known = _TWINS.setdefault(groups_of(dist.group.WORLD)[0], {})
    ranks = tuple(sorted(dist.get_process_group_ranks(group)))
    if ranks not in known:
        found = dist.get_backend(group)
        backend = "gloo" if dist.is_gloo_available() else found
        if found == "mpi":  # which makes groups with all ranks alone
            return group
        known[ranks] = dist.new_group(
            list(ranks),
            timeout=_timeout_of(group),
            backend=backend,
            # Ranks of other groups do not come here. But torch then names a group by
            # how many the rank is in, and ranks with other names would not meet.
            use_local_synchronization=len(ranks) < dist.get_world_size(),
        )
    return known[ranks]


def serving(group: ProcessGroup, device: torch.device) -> ProcessGroup:
    """Return a group, or that of our own with its ranks for what it cannot send.

    Such as tensors on the CPU, where all ranks have NCCL alone.
    """
    lacks = device.type == "cpu" and "cpu" not in _devices_of(group)
    return twin_of(group) if lacks else group


def _timeout_of(group: ProcessGroup) -> Any:
    """Return how long a group waits; None, where torch does not tell: its default."""
    backend = group._get_backend(_device_of(group))
    return getattr(getattr(backend, "options", None), "_timeout", None)


def _device_of(group: ProcessGroup) -> torch.device:
    """Return where tensors must lie for a group; on the CPU if it can.

    Else on the current device, that of `torch.cuda.set_device`, as torch has it.
    """
    devices = _devices_of(group)
    return torch.device("cpu" if "cpu" in devices else devices[0])


def _devices_of(group: ProcessGroup) -> list[str]:
    """Return the types of devices that a group can send from."""
    # such as "cpu:gloo,cuda:nccl"
    backends = dist.get_backend_config(group).split(",")
    return [backend.partition(":")[0] for backend in backends]
