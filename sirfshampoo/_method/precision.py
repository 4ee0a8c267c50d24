"""The precision of matrix products: that of their tensors, whatever the user's mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeAlias

import torch

Precision: TypeAlias = AbstractContextManager[None]


def full_precision(device_types: set[str]) -> Precision:
    """Switch off TF32, reduced-precision float32 products and autocast for a while.

    Factors are multiplied onto themselves again and again: an error of a product that
    is coarser than the tensors' type would be learned.
    """
    casting = [
        device_type
        for device_type in device_types
        if torch.amp.is_autocast_available(device_type)
        and torch.is_autocast_enabled(device_type)
    ]
    lowered = _lowered_modes()
    if not casting and not lowered:
        return nullcontext()  # the one context that no version of the compiler minds
    return _switched(casting, lowered)


@contextmanager
def _switched(casting: Sequence[str], lowered: Sequence[Any]) -> Iterator[None]:
    """Switch off autocast for types of devices, and modes of float32 products."""
    with ExitStack() as stack:
        for device_type in casting:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        modes = [backend.fp32_precision for backend in lowered]
        for backend in lowered:
            backend.fp32_precision = "ieee"
        try:
            yield
        finally:
            for backend, mode in zip(lowered, modes, strict=True):
                backend.fp32_precision = mode


class _OneForAll:
    """The one switch that torch < 2.9 has, under the name of the newer ones."""

    @property
    def fp32_precision(self) -> str:
        """Whether products in float32 are computed in it."""
        mode = torch.get_float32_matmul_precision()
        return "ieee" if mode == "highest" else mode

    @fp32_precision.setter
    def fp32_precision(self, mode: str) -> None:
        torch.set_float32_matmul_precision("highest" if mode == "ieee" else mode)


def _lowered_modes() -> list[Any]:
    """Return the switches of float32 products that stand at less."""
    switches: list[Any] = [torch.backends.cuda.matmul]
    switches.append(getattr(torch.backends.mkldnn, "matmul", None))
    if not all([hasattr(switch, "fp32_precision") for switch in switches]):
        switches = [_OneForAll()]
    return [s for s in switches if s.fp32_precision not in ("none", "ieee")]
