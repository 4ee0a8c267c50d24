"""Runs one list of checks: `python -m benchmarks.gpu.checks GROUP DEVICE [tiny]`.

Each outcome is one line of JSON on standard output, told as soon as it is known.
"""

import json
import os
import sys
import traceback
import warnings
from time import perf_counter
from typing import Any

import torch

from benchmarks.gpu.checks import agreement, graphs, ranks, state, waits
from benchmarks.gpu.checks.common import Check
from benchmarks.gpu.checks.failure import tell

GROUPS = {
    "agreement": agreement.checks,
    "waits": waits.checks,
    "graphs": graphs.checks,
    "state": state.checks,
    "ranks": ranks.checks,
    "compiled": graphs.compiled_checks,
}
"""Each in a process of its own: what one breaks on the device, others do not feel."""


def outcome(check: Check, device: str) -> dict[str, Any]:
    """Run a check; say how it went."""
    start, told = perf_counter(), ""
    try:
        remark = check.run()
        if device == "cuda":
            torch.cuda.synchronize()
        told = remark or ""
        status = "not on this device" if check.of_gpus and device == "cpu" else "ok"
    except Exception as error:  # told, and the next one goes on
        traceback.print_exc()
        status = "failed"
        told = tell(error)
    seconds = round(perf_counter() - start, 2)
    return {"name": check.name, "status": status, "seconds": seconds, "told": told}


def main() -> None:
    """Run the checks of the group that the command line names."""
    name, device, tiny = sys.argv[1], sys.argv[2], "tiny" in sys.argv[3:]
    # what libraries print must not end up between the outcomes
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.filterwarnings("ignore", message="Synchronization debug mode")
    torch.set_num_threads(1 if device == "cpu" else 2)
    found = GROUPS[name](device, tiny)
    print(json.dumps({"checks": [check.name for check in found]}), file=answers)
    for check in found:
        print(json.dumps(outcome(check, device)), file=answers, flush=True)


if __name__ == "__main__":
    main()
