"""The precision of matrix products: that of their tensors, whatever the user's mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device_types: set[str]) -> Iterator[None]:
    """Switch off TF32, reduced-precision float32 products and autocast for a while.

    Factors are multiplied onto themselves again and again: an error of a product that
    is coarser than the tensors' type would be learned.
    """
    with ExitStack() as stack:
        for device_type in device_types:
            if torch.amp.is_autocast_available(device_type) and (
                torch.is_autocast_enabled(device_type)
            ):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_ieee_products())
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    backends: list[Any] = [torch.backends.cuda.matmul]
    backends.append(getattr(torch.backends.mkldnn, "matmul", None))
    if not all(hasattr(backend, "fp32_precision") for backend in backends):
        # torch < 2.9 has one switch for all
        mode = torch.get_float32_matmul_precision()
        if mode == "highest":
            yield
            return
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(mode)
        return
    modes = [backend.fp32_precision for backend in backends]
    lowered = [
        (backend, mode)
        for backend, mode in zip(backends, modes, strict=True)
        if mode not in ("none", "ieee")
    ]
    for backend, _ in lowered:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, mode in lowered:
            backend.fp32_precision = mode
