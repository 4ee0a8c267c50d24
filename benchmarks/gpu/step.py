"""Stage 3: what a step takes, beside fused AdamW in the same run and under the roof."""

import gc
from collections.abc import Iterable
from importlib.util import find_spec
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu.clock import elapsed, product_rate
from benchmarks.gpu.contestants import (
    CONTESTANTS,
    LONGEST,
    UNIT,
    Contestant,
    Entry,
    operations,
)
from benchmarks.gpu.shapes import TINY, WORKLOADS, Parameters
from benchmarks.gpu.trace import trace
from benchmarks.gpu.visit import Visit
from benchmarks.workloads import Shapes, largest_products, numbers

ROUNDS, ROUNDS_IF_TINY = 5, 2
ENOUGH_SECONDS = 2.0  # of one contestant; two rounds it has in any case
UNIT_STEPS = 10
TRACED = 1  # of which worth
LEAST_STEPS, SLOW_MS = 5, 100  # in a turn; slower steps need no company
COMPILED = ("100x64", "4x2048", "gpt2-small")  # which takes long: in this order


class Run:
    """One workload: fused AdamW has a turn before each turn of a contestant."""

    def __init__(self, shapes: Shapes, visit: Visit) -> None:
        """Draw parameters, which all contestants move; warm the unit up."""
        self.visit, self.device = visit, visit.device
        self.model = Parameters(shapes, visit.device)
        self.unit = Entry(UNIT, self.model, visit.device)

    def measure(self, contestant: Contestant) -> dict[str, Any]:
        """Return what is found of a contestant, and why there is no more, if so."""
        found = {"label": contestant.label, **vars(contestant), "rounds": []}
        try:
            self._measure(contestant, found)
            found["error"] = None
        except Exception as error:  # told; the next one goes on
            found["error"] = f"{type(error).__name__}: {error}"[:400]
        if contestant.way == "compiled":
            torch._dynamo.reset()
        if self.device == "cuda":
            gc.collect()  # units and stacks refer to each other
            torch.cuda.empty_cache()
        return found

    def _measure(self, contestant: Contestant, found: dict[str, Any]) -> None:
        if contestant.is_ours:
            found["flops"] = operations(contestant, self.model)
        before = self._allocated()
        begin = perf_counter()
        entry = Entry(contestant, self.model, self.device)
        found["ready_s"] = round(perf_counter() - begin, 2)
        found["held_bytes"] = self._allocated() - before
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        once = elapsed(entry.step, self.device).device
        periods = 1 if once > SLOW_MS else max(1, LEAST_STEPS // contestant.T)
        steps = contestant.T * periods
        begin = perf_counter()
        rounds = ROUNDS_IF_TINY if self.visit.tiny else ROUNDS
        while len(found["rounds"]) < rounds:
            self.model.draw()
            unit = elapsed(self.unit.step, self.device, UNIT_STEPS)
            entry.start_period()
            ours = elapsed(entry.step, self.device, steps)
            numbers = {"ms": ours.device, "host_ms": ours.host, "unit_ms": unit.device}
            found["rounds"].append({k: round(v, 5) for k, v in numbers.items()})
            if perf_counter() - begin > ENOUGH_SECONDS and len(found["rounds"]) > 1:
                break
        if self.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        sums = torch.stack([p.detach().float().sum() for p in self.model.parameters()])
        if not bool(sums.isfinite().all()):
            raise RuntimeError("A parameter is not finite.")
        if contestant.worth <= TRACED:
            found |= self._traced(entry)

    def _traced(self, entry: Entry) -> dict[str, Any]:
        """Count the kernels of a step of each kind, and how long the device is busy."""
        T, traces = entry.contestant.T, {}
        kinds = (True, False) if T > 1 and entry.contestant.is_ours else (True,)
        for due in kinds:
            if entry.contestant.is_ours:
                entry.go_to(due=due)
            seen = trace(entry.step, self.device)
            if not seen.launches:  # the profiler may not look at the device
                return {}
            kind = "update" if due else "plain"
            traces[f"launches_{kind}"] = seen.launches
            traces[f"busy_us_{kind}"] = round(seen.busy_us, 1)
        return traces

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0


def roofs(shapes: Shapes, visit: Visit) -> dict[str, dict[str, float]]:
    """Return the product rates, in Gflop/s, of squares and of the workload's own."""
    multiplied = {k: s for k, s in shapes.items() if max(s) <= LONGEST}
    own = largest_products(multiplied, most=1)
    size = 64 if visit.tiny else 4096
    return {
        dtype: {
            "square": product_rate(1, size, size, size, dtype, visit.device),
            "own": max(
                product_rate(number, d, d, columns, dtype, visit.device)
                for number, d, columns in own
            ),
        }
        for dtype in ("float32", "bfloat16")
    }


def wanted(
    workloads: Iterable[str], compiled: Iterable[str]
) -> list[tuple[str, Contestant]]:
    """Return who is timed on which workload, those of most worth first."""
    spared = set() if find_spec("pytorch_optimizer") else {"SOAP"}
    found = []
    for worth in sorted({c.worth for c in CONTESTANTS}):
        contestants = [c for c in CONTESTANTS if c.worth == worth]
        plain = [c for c in contestants if c.way != "compiled"]
        found += [(name, c) for name in workloads for c in plain]
        slow = [c for c in contestants if c not in plain]
        found += [(name, c) for name in compiled for c in slow]
    # Muon takes matrices alone
    return [
        (name, c)
        for name, c in found
        if c.title not in spared and (name, c.title) != ("vectors", "Muon")
    ]


def run(visit: Visit) -> None:
    """Time all contestants on all workloads, those of most worth first."""
    workloads = TINY if visit.tiny else WORKLOADS
    told: dict[str, Any] = {}
    not_reached = wanted(workloads, ["4x2048"] if visit.tiny else COMPILED)
    known: tuple[str, Run] | None = None
    while not_reached and visit.left() > (1 if visit.tiny else 6):
        name, contestant = not_reached.pop(0)
        if name not in told:
            count = numbers(workloads[name])
            told[name] = {"numbers": count, "roofs": roofs(workloads[name], visit)}
            told[name]["contestants"] = []
        if known is None or known[0] != name:
            known = None  # its memory is free before the next is taken
            known = (name, Run(workloads[name], visit))
        told[name]["contestants"].append(known[1].measure(contestant))
        left = [f"{name}: {contestant.label}" for name, contestant in not_reached]
        visit.save(unit=UNIT.label, workloads=told, not_reached=left)


def ratio(found: dict[str, Any]) -> float:
    """Return a step in units of the fused AdamW steps of the same round."""
    return median(r["ms"] / r["unit_ms"] for r in found["rounds"])


def milliseconds(found: dict[str, Any], which: str = "ms") -> float:
    """Return the median over the rounds."""
    return median(r[which] for r in found["rounds"])


def share(found: dict[str, Any], roofs: dict[str, dict[str, float]]) -> float | None:
    """Return counted operations by the roof of the factors' type; None for others."""
    if not found.get("flops"):
        return None
    rate = found["flops"] / milliseconds(found) / 1e6  # Gflop/s
    return rate / max(roofs[found["dtype"]].values())


def idle(found: dict[str, Any]) -> float | None:
    """Return the part of a step in which nothing runs on the device; None: unknown."""
    if "busy_us_update" not in found:
        return None
    update, T = found["busy_us_update"], found["T"]
    busy = (update + (T - 1) * found.get("busy_us_plain", update)) / T
    return max(0.0, 1 - busy / 1e3 / milliseconds(found))
