"""How long the device is busy with something, and how fast it multiplies."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

MOST_SECONDS = 0.15  # for one rate


class Time(NamedTuple):
    """What some calls took, each on average, in milliseconds."""

    device: float  # until their work was done
    host: float  # until the host was free again


def elapsed(call: Callable[[], Any], device: str, calls: int = 1) -> Time:
    """Time calls in a row, from a device that has nothing to do."""
    if device == "cpu":
        start = perf_counter()
        for _ in range(calls):
            call()
        ms = 1e3 * (perf_counter() - start) / calls
        return Time(ms, ms)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start = perf_counter()
    first.record()
    for _ in range(calls):
        call()
    last.record()
    host = 1e3 * (perf_counter() - start)
    last.synchronize()
    return Time(first.elapsed_time(last) / calls, host / calls)


def typical(call: Callable[[], Any], device: str) -> float:
    """Return the median time of a call in seconds, after one that is not counted."""
    once = max(elapsed(call, device).device, 1e-3) / 1e3
    once = max(elapsed(call, device).device, 1e-3) / 1e3
    calls = max(1, min(50, int(MOST_SECONDS / 5 / once)))
    return median(elapsed(call, device, calls).device for _ in range(5)) / 1e3


def product_rate(number: int, m: int, k: int, n: int, dtype: str, device: str) -> float:
    """Return the Gflop/s of `number` products ``[m, k] @ [k, n]`` in one call.

    The type is a name, or ``"tf32"``.
    """
    kind: Any = {"dtype": getattr(torch, dtype, torch.float32), "device": device}
    shapes = ((m, k), (k, n), (m, n))
    a, b, out = (torch.ones(number, *shape, **kind) for shape in shapes)
    # a card that multiplies ones draws less power, and is faster than it will be
    a.normal_()
    b.normal_()
    if number == 1:
        a, b, out = a[0], b[0], out[0]
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    try:
        seconds = typical(lambda: torch.matmul(a, b, out=out), device)
    finally:
        torch.set_float32_matmul_precision("highest")
    return 2 * number * m * n * k / seconds / 1e9


def copy_rate(numbers: int, device: str) -> float:
    """Return how much is read and written in a second, in GB."""
    source = torch.ones(numbers, device=device)
    target = torch.empty_like(source)
    seconds = typical(lambda: target.copy_(source), device)
    return 2 * source.nbytes / seconds / 1e9
