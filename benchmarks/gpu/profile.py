"""Stage 5: what one step with an update does on the device, and one without."""

from typing import Any

import torch

from benchmarks.gpu.clock import elapsed
from benchmarks.gpu.contestants import UNIT, Contestant, Entry
from benchmarks.gpu.shapes import TINY, WORKLOADS, Parameters
from benchmarks.gpu.trace import trace
from benchmarks.gpu.visit import Visit

CASES = (
    ("gpt2-small", Contestant("recipe", "float32", 10)),
    ("4x2048", Contestant("dense", "bfloat16", 10)),
    ("100x64", Contestant("dense", "bfloat16", 10)),
    ("llama-2048", Contestant("dense", "bfloat16", 10)),
    ("gpt2-small", UNIT),
)
MOST = 30  # kernels that are named


def run(visit: Visit) -> None:
    """Trace each case."""
    workloads, cases = TINY if visit.tiny else WORKLOADS, []
    for workload, contestant in CASES:
        if workload not in workloads:
            continue
        if visit.left() < 2:
            visit.save(cut=f"at {workload}: {contestant.label}")
            return
        model = Parameters(workloads[workload], visit.device)
        entry = Entry(contestant, model, visit.device)
        found: dict[str, Any] = {"workload": workload, "label": contestant.label}
        for kind in ("update", "plain") if contestant.is_ours else ("step",):

            def go(entry: Entry = entry, kind: str = kind) -> None:
                if entry.contestant.is_ours:
                    entry.go_to(due=kind == "update")

            go()
            found[kind] = trace(entry.step, visit.device).record(MOST)
            go()
            time = elapsed(entry.step, visit.device)
            found[kind] |= {"ms": round(time.device, 4), "host_ms": round(time.host, 4)}
        cases.append(found)
        visit.save(cases=cases)
        del entry, model
        if visit.device == "cuda":
            torch.cuda.empty_cache()
