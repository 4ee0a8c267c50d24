"""How much memory an optimizer keeps, and how much more a step takes."""

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor, nn
from torch.optim import Optimizer

TRAVERSED = ("sirfshampoo", "singd", "pytorch_optimizer", "heavyball")
"""Packages whose objects are looked into for tensors."""

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def held_tensors(obj: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield all tensors reachable from an optimizer's attributes, caches included."""
    if id(obj) in seen:
        return
    seen.add(id(obj))
    children: Iterable[object] = ()
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        children = [*obj.keys(), *obj.values()]
    elif isinstance(obj, list | tuple | set | frozenset):
        children = obj
    elif isinstance(obj, Optimizer) or type(obj).__module__.split(".")[0] in TRAVERSED:
        slots = getattr(type(obj), "__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
        children = [getattr(obj, name, None) for name in names]
        children += list(getattr(obj, "__dict__", {}).values())
    for child in children:
        yield from held_tensors(child, seen)


def held_bytes(optimizer: object, model: nn.Module) -> int:
    """Count the bytes an optimizer keeps between steps, each storage once.

    Parameters and their gradients do not count; cached products do.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held_tensors(optimizer, set())
    }
    for p in model.parameters():
        for tensor in (p.detach(), p.grad):
            if tensor is not None:
                storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


class Peak:
    """Measures how far memory rises above where it was at the start.

    It asks Linux for the resident memory of the process, after what the C library holds
    back has been returned; elsewhere it measures nothing.

    Attributes:
        bytes: The rise; `None` if it cannot be measured here.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._start = 0

    def __enter__(self) -> "Peak":
        if _forget_resident_peak():
            self._start = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._start:
            self.bytes = max(0, _resident("VmHWM") - self._start)


def _forget_resident_peak() -> bool:
    """Reset VmHWM; say whether the system allows it."""
    try:
        # Freed blocks that the C library kept would be used again, unseen.
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident(name: str) -> int:
    """Return an entry of the process' status, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(name)
