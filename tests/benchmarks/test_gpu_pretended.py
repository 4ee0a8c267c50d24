"""The paths of the visit that need a GPU, on a CPU that passes for one.

What is asked of `torch.cuda` is answered by stand-ins, and tensors that are to lie on
the GPU lie on the CPU. That finds no wrong number, but a name that does not exist.
"""

import json
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from time import monotonic, perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from benchmarks.gpu import machine, profile, shapes, step, trace, train
from benchmarks.gpu.checks import agreement, graphs, state, waits
from benchmarks.gpu.visit import Visit, surroundings
from tests.benchmarks.test_gpu import needs_text

TINY = {"4x2048": {"weight0": (8, 8), "weight1": (8, 8)}, "vectors": {"v": (4,)}}


class OnTheCpu(TorchFunctionMode):
    """Puts on the CPU what is to lie on a GPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {k: _place(v) for k, v in (kwargs or {}).items()}
        return func(*(_place(a) for a in args), **kwargs)


def _place(value: Any) -> Any:
    on_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return "cpu" if on_gpu or (isinstance(value, str) and value == "cuda") else value


class Event:
    """A mark in time."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: "Event") -> float:
        return max(1e3 * (later.at - self.at), 1e-4)


class Graph:
    """Has done what it captured, while it captured it."""

    def replay(self) -> None:
        pass


class Stream:
    """Waits for nobody."""

    def wait_stream(self, other: "Stream") -> None:
        pass


STAND_INS: dict[str, Any] = {
    "Event": Event,
    "CUDAGraph": Graph,
    "Stream": Stream,
    "graph": lambda graph: nullcontext(),
    "stream": lambda stream: nullcontext(),
    "current_stream": Stream,
    "synchronize": lambda: None,
    "set_sync_debug_mode": lambda mode: None,
    "empty_cache": lambda: None,
    "memory_allocated": lambda: 0,
    "max_memory_allocated": lambda: 1 << 30,
    "reset_peak_memory_stats": lambda: None,
    "get_device_name": lambda device: "Card",
    "get_device_properties": lambda index: SimpleNamespace(
        total_memory=1, multi_processor_count=2, major=9, minor=0
    ),
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pass for a GPU."""
    for name, stand_in in STAND_INS.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(trace, "DEVICE", trace.HOST)
    monkeypatch.setattr(shapes, "TINY", TINY)
    monkeypatch.setattr(step, "TINY", TINY)
    with OnTheCpu():
        yield


@pytest.mark.filterwarnings("ignore")  # of a profiler without a GPU
@pytest.mark.parametrize(
    "stage", [machine, step, pytest.param(train, marks=needs_text), profile]
)
def test_a_stage_knows_the_names_of_cuda(
    stage: Any, gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = [c for c in step.CONTESTANTS if c.way == "compiled"]
    others = tuple(c for c in step.CONTESTANTS if c not in compiled)
    monkeypatch.setattr(step, "CONTESTANTS", others)
    monkeypatch.setattr(train, "TINY", train.Size(1, 16, 2, 16, 2, 2, 20))
    visit = Visit(stage.__name__, "cuda", True, tmp_path, monotonic() + 30)
    visit.save(environment=surroundings("cuda"))
    stage.run(visit)
    result = json.loads((tmp_path / f"{stage.__name__}.json").read_text())
    assert result["environment"]["kind"] == "cuda"
    if stage is step:
        every = [c for w in result["workloads"].values() for c in w["contestants"]]
        assert [c["error"] for c in every if c["error"]] == []
        assert all(c["peak_bytes"] == 1 << 30 for c in every)
    if stage is train:
        assert all(run["peak_bytes"] for run in result["runs"])


@pytest.mark.parametrize("group", [agreement, waits, graphs, state])
def test_a_check_knows_the_names_of_cuda(group: Any, gpu: None) -> None:
    for check in group.checks("cuda", tiny=True):
        # numbers of a graph that does nothing, places that are not what they seem
        with suppress(AssertionError):
            check.run()
