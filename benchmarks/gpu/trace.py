"""What a call makes the device do, kernel by kernel, as the profiler sees it."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
HOST = ("cpu_op",)  # what stands in for kernels where there are none


@dataclass(frozen=True)
class Trace:
    """What was seen.

    Attributes:
        kernels: Name, number of launches and microseconds in all; the costliest first.
        busy_us: For how long something ran on the device.
        span_us: From the start of the first to the end of the last.
    """

    kernels: list[tuple[str, int, float]]
    busy_us: float
    span_us: float

    @property
    def launches(self) -> int:
        """How many kernels, copies and fills there were."""
        return sum(count for _, count, _ in self.kernels)

    def record(self, most: int) -> dict[str, Any]:
        """Return plain data, with the costliest kernels."""
        return {
            "launches": self.launches,
            "busy_us": round(self.busy_us, 1),
            "span_us": round(self.span_us, 1),
            "kernels": [
                {"name": name[:160], "count": count, "us": round(us, 1)}
                for name, count, us in self.kernels[:most]
            ],
            "other_us": round(sum(us for *_, us in self.kernels[most:]), 1),
        }


def trace(call: Callable[[], Any], device: str) -> Trace:
    """Call once under the profiler."""
    activities = [ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with profile(activities=activities) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return summed(events, DEVICE if device == "cuda" else HOST)


def summed(events: list[dict[str, Any]], categories: tuple[str, ...]) -> Trace:
    """Sum events of some categories; what overlaps is busy once."""
    spans, of_name = [], defaultdict(list)
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in categories:
            start, length = float(event["ts"]), float(event["dur"])
            spans.append((start, start + length))
            of_name[event["name"]].append(length)
    kernels = [(name, len(us), sum(us)) for name, us in of_name.items()]
    kernels.sort(key=lambda kernel: -kernel[2])
    busy, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    first = min((start for start, _ in spans), default=0.0)
    return Trace(kernels, busy, until - first if spans else 0.0)
