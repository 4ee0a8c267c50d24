"""Stage 1: what the machine is, and the roofs over everything that follows."""

import shutil
import subprocess
from typing import Any

import torch

from benchmarks.gpu.clock import copy_rate, product_rate
from benchmarks.gpu.visit import Visit, surroundings

SIZES = (256, 512, 1024, 2048, 4096, 8192)
TINY = (32, 64)
TYPES = ("float32", "tf32", "bfloat16")
QUERY = "driver_version,clocks.max.sm,clocks.max.mem,power.limit,persistence_mode"


def device_facts(device: str) -> dict[str, Any]:
    """Return what the device and its driver say of themselves."""
    facts = surroundings(device)
    facts["compiler"] = shutil.which("gcc") or shutil.which("cc")
    if device == "cpu":
        return facts
    properties = torch.cuda.get_device_properties(0)
    facts |= {
        "memory": properties.total_memory,
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
    }
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        told = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
        facts |= dict(zip(QUERY.split(","), told, strict=False))
    except (OSError, subprocess.TimeoutExpired) as error:
        facts["driver_version"] = f"unknown: {error}"
    return facts


def run(visit: Visit) -> None:
    """Measure the rate of copies and of products."""
    visit.save(machine=device_facts(visit.device))
    numbers = 2**20 if visit.tiny else 2**28
    visit.save(copy_GB_per_s=round(copy_rate(numbers, visit.device), 1))
    rates: list[dict[str, Any]] = []
    # the large ones first: they are the roofs
    for size in reversed(TINY if visit.tiny else SIZES):
        for dtype in TYPES:
            for number in (1, max(2, min(64, 2**26 // size**2))):
                if visit.left() < 1:
                    visit.save(cut=f"at {size}")
                    return
                rate = product_rate(number, size, size, size, dtype, visit.device)
                row = {"dtype": dtype, "size": size, "number": number}
                rates.append(row | {"Gflop_per_s": round(rate, 1)})
        visit.save(products=rates)
