"""Trains for very long and watches loss and memory: `python -m benchmarks.soak`."""

import argparse
import gc
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks import environment, results, tables
from sirfshampoo import SIRFShampoo

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SAMPLES = 20  # how often a run is looked at
WARM = 2  # the sample that the last one is compared with: after a tenth of the steps
WIDTH = 33  # a block of 30 and one of 3, a hierarchy with a middle
NOISE = 0.1  # of the targets: gradients never vanish, the loss stays above its square
RSS_LIMIT = 4 * 2**20  # bytes; allocators round, a leak of 1 KiB a step is 18 MiB
LOSS_LIMIT = 5 * NOISE**2  # of the last sample; the first step has 75 NOISE**2


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Let the collector look at nothing older: a collection takes no time then."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@only_new_objects()
def soak(
    structure: str,
    dtype: str,
    steps: int,
    after_sample: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Train a small net on an endless stream of noisy examples.

    Args:
        structure: Of all Kronecker factors.
        dtype: Name of their data type.
        steps: How many; a multiple of `SAMPLES`.
        after_sample: Called with the number of steps since the last call.

    Returns:
        The entry for the JSON file. `loss` has the mean over all steps since the
        sample before; `rss` (bytes), `tensors` (Python objects that live) and `finite`
        (every parameter, every number of the state) are looked at in each sample.
    """
    torch.manual_seed(0)
    teacher, model = _net().requires_grad_(False), _net()
    for p in teacher.parameters():
        p.mul_(2)
    stream = torch.Generator().manual_seed(1)
    optimizer = SIRFShampoo(
        model,
        lr=1e-3,  # constant: a schedule that ends at 0 would hide a late divergence
        beta2=0.05,
        structures=structure,
        preconditioner_dtypes=DTYPES[dtype],
    )
    record: dict[str, Any] = {"structure": structure, "dtype": dtype, "steps": steps}
    record |= {"loss": [], "rss": [], "tensors": [], "finite": []}
    start = time.perf_counter()
    for _ in range(SAMPLES):
        total = torch.zeros(())
        for _ in range(steps // SAMPLES):
            x = torch.randn(32, WIDTH, generator=stream)
            noise = NOISE * torch.randn(32, WIDTH, generator=stream)
            optimizer.zero_grad()
            loss = (model(x) - teacher(x) - noise).square().mean()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        record["loss"].append(total.item() / (steps // SAMPLES))
        record["finite"].append(all(_finite(t) for t in _numbers(optimizer)))
        record["tensors"].append(living_tensors())
        record["rss"].append(psutil.Process().memory_info().rss)
        after_sample(steps // SAMPLES)
    record["skipped"] = sum(int(s.get("skipped", 0)) for s in optimizer.state.values())
    return record | {"seconds": round(time.perf_counter() - start, 1)}


def _net() -> nn.Module:
    """Make two layers of the same shape: they share stacks."""
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))


def _numbers(optimizer: SIRFShampoo) -> Iterator[Tensor]:
    """Yield all parameters and all state."""
    for p, entries in optimizer.state.items():
        yield p
        yield from entries.values()


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def living_tensors() -> int:
    """Count the tensors that Python knows and has not frozen, after a collection."""
    gc.collect()
    # by type: `isinstance` would wake lazy objects that other modules keep
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def growth(record: dict[str, Any], what: str) -> int:
    """Return by how much a measure rose from the end of the warm-up on."""
    return int(record[what][-1] - record[what][WARM - 1])


def problems(record: dict[str, Any], loss_limit: float = LOSS_LIMIT) -> list[str]:
    """Say what went wrong in a run, if anything did."""
    found = []
    if not all(record["finite"]) or not all(map(isfinite, record["loss"])):
        found.append("something was not finite")
    if record["skipped"]:
        found.append(f"{record['skipped']} steps were sat out")
    if growth(record, "tensors") > 0:
        found.append(f"{growth(record, 'tensors')} tensors piled up")
    if growth(record, "rss") > RSS_LIMIT:
        found.append(f"resident memory grew by {growth(record, 'rss')} bytes")
    if not record["loss"][-1] < loss_limit:
        found.append(f"the loss ended at {record['loss'][-1]:.4f}")
    return found


def whole_samples(text: str) -> int:
    """Read a number of steps from the command line."""
    if not text.isdecimal() or int(text) < SAMPLES or int(text) % SAMPLES:
        raise argparse.ArgumentTypeError(
            f"needs a positive multiple of {SAMPLES}, got {text!r}"
        )
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak",
        description="Train a small net for very long with every structure, with "
        "float32 and bfloat16 factors; look whether all stays finite, memory flat and "
        "the loss low. Writes JSON, which `python -m benchmarks.report` turns into a "
        "table.",
    )
    add = parser.add_argument
    add("--steps", type=whole_samples, default=20_000, help="default: %(default)s")
    add("--only", default="", metavar="REGEX", help="runs, such as 'dense bfloat16'")
    add("--results", type=Path, default=results.RESULTS, help="folder of the file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, show and save; return 1 if a run had a problem."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    torch.set_num_threads(1)
    names = [(s, d) for s in SIRFShampoo.SUPPORTED_STRUCTURES for d in DTYPES]
    chosen = [name for name in names if re.search(args.only, " ".join(name))]
    result: dict[str, Any] = {
        "environment": environment.describe(threads=1),
        "parameters": sum(p.numel() for p in _net().parameters()),
        "warm": WARM,
        "soaks": [],
    }
    with Progress(console=console) as progress:
        bar = progress.add_task("", total=len(chosen) * args.steps)
        for structure, dtype in chosen:
            progress.update(bar, description=f"{structure}, {dtype}")
            advance = lambda steps: progress.advance(bar, steps)  # noqa: E731
            record = soak(structure, dtype, args.steps, after_sample=advance)
            result["soaks"].append(record)
            for problem in problems(record):
                progress.console.print(f"[red]{structure}, {dtype}: {problem}")
    path = args.results / "soak.json"
    results.save(result, path)
    console.print(tables.soak(result).rich("Soak"))
    console.print(f"Saved {os.path.relpath(path)}; now `python -m benchmarks.report`.")
    return int(any(problems(record) for record in result["soaks"]))


if __name__ == "__main__":
    sys.exit(main())
