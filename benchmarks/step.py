"""Times `step()` of each contestant: `python -m benchmarks.step --help`."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import environment, results, tables
from benchmarks.agreement import compare
from benchmarks.contestants import UNIT, Contestant, choose
from benchmarks.process import Worker, WorkerError
from benchmarks.workloads import (
    CONSTRUCTION,
    GROWTH,
    WORKLOADS,
    Shapes,
    largest_products,
    numbers,
)

UNIT_STEPS = 8  # AdamW's share of a turn
GROWN = ("diagonal", "mixed", "dense")  # what --scaling grows unasked


@dataclass
class Measured:
    """What has been measured of one contestant so far."""

    contestant: Contestant
    bytes: int | None = None
    peak: int | None = None
    work: dict[str, Any] | None = None
    steps: int = 0  # timed steps in a turn: whole periods of T
    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the entry for the JSON file."""
        has_factors = self.contestant.structures is not None
        has_period = self.contestant.has_period
        return {
            "package": self.contestant.package,
            "title": self.contestant.title,
            "structures": self.contestant.structures,
            "dtype": self.contestant.dtype if has_factors else None,
            "T": self.contestant.T if has_period else None,
            "bytes": self.bytes,
            "peak": self.peak,
            "work": self.work,
            "error": self.error,
            "rounds": self.rounds,
        }


class Run:
    """One measurement: contestants of both packages take turns, never two at once."""

    def __init__(
        self, workers: Mapping[str, Worker], shapes: Shapes, turn_seconds: float
    ) -> None:
        """Start with nothing measured."""
        self.workers = workers
        self.shapes = shapes
        self.turn_seconds = turn_seconds

    def _worker(self, contestant: Contestant) -> Worker:
        return self.workers[worker_of(contestant)]

    def add(self, contestant: Contestant) -> Measured:
        """Warm a contestant up; choose how many steps a turn of it has."""
        measured, T = Measured(contestant), contestant.T
        try:
            if contestant.structures is not None:
                measured.work = self.workers["ours"].ask(
                    "work", spec=contestant.spec(), shapes=self.shapes
                )
            answer = self._worker(contestant).ask(
                "add",
                key=contestant.label,
                spec=contestant.spec(),
                shapes=self.shapes,
                warmup=max(3, T + 2),
                peak=T,
            )
        except WorkerError as error:
            measured.error = str(error)
            return measured
        measured.peak = answer["peak"]
        measured.bytes = answer["bytes"]
        wanted = 1e3 * self.turn_seconds / median(answer["ms"][1:])
        measured.steps = T * ceil(min(10, max(2, wanted)) / T)
        return measured

    def turn(self, measured: Measured) -> None:
        """Time AdamW, then right after it a contestant."""
        if measured.error:
            return
        try:
            unit = self.workers["ours"].ask("turn", key=UNIT.label, steps=UNIT_STEPS)
            ms = unit
            if measured.contestant != UNIT:
                ms = self._worker(measured.contestant).ask(
                    "turn", key=measured.contestant.label, steps=measured.steps
                )
        except WorkerError as error:
            measured.error = str(error)
            return
        rounded = {"ms": [round(x, 4) for x in ms]}
        measured.rounds.append(rounded | {"unit_ms": [round(x, 4) for x in unit]})

    def construction(self) -> dict[str, list[float]]:
        """Time the constructors, each used before, on many parameters (seconds)."""
        spec = {"structures": "dense", "dtype": "float32", "T": 1}
        both = same_name(self.workers)
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(3):
            for name, worker in both.items():
                seconds = worker.ask("construct", spec=spec, shapes=CONSTRUCTION)
                times[name].append(round(seconds, 4))
        return times


def worker_of(contestant: Contestant) -> str:
    """Name the process that a contestant lives in."""
    return "ours" if contestant.package == "torch" else contestant.package


def same_name(workers: Mapping[str, Worker]) -> dict[str, Worker]:
    """Return the processes of the two packages that are called `sirfshampoo`."""
    return {k: worker for k, worker in workers.items() if k in ("ours", "official")}


def start(
    packages: Iterable[str], args: argparse.Namespace, console: Console
) -> tuple[dict[str, Worker], dict[str, Any]]:
    """Start a process for this package and for each that is named.

    Returns:
        The processes, and of each other package its versions or why it is missing.
    """
    workers = {"ours": Worker(environment.ROOT, args.threads, args.device)}
    found: dict[str, Any] = {}
    for package in packages:
        try:
            folder = args.official_folder if package == "official" else None
            folder = folder or environment.folder_of(package)
            name = environment.IMPORT_NAMES.get(package, "sirfshampoo")
            workers[package] = Worker(folder, args.threads, args.device, name)
            versions = workers[package].versions
            if package != "official":  # the environment's own, which it does not use
                versions = {package: versions[package]}
            found[package] = versions
        except (RuntimeError, OSError) as error:
            found[package] = f"not measured: {error}"
            console.print(f"[yellow]{package} package {found[package]}")
    return workers, found


def measure(
    workload: str, args: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Run everything that the command line asks for on one workload."""
    shapes = WORKLOADS[workload]()
    chosen = choose(args.only, args.structure, args.dtype, args.T)
    packages = dict.fromkeys(worker_of(c) for c in chosen if worker_of(c) != "ours")
    if not args.official:
        packages.pop("official", None)
    if not args.peers:
        packages = {k: None for k in packages if k == "official"}
    workers, found = start(packages, args, console)
    result: dict[str, Any] = {
        "workload": workload,
        "parameters": len(shapes),
        "numbers": numbers(shapes),
        "environment": environment.describe(args.threads, args.device),
        "official": found.pop("official", None),
        "peers": found,
    }
    try:
        run = Run(workers, shapes, args.turn_seconds)
        chosen = [c for c in chosen if c != UNIT and worker_of(c) in workers]
        result |= alternate(run, [UNIT, *chosen], args.rounds, console)
        result["construction"] = {"parameters": len(CONSTRUCTION)}
        result["construction"]["seconds"] = run.construction()
        result["agreement"] = [
            compare(same_name(workers), shapes, T)
            for T in (1, 10)
            if "official" in workers
        ]
    finally:
        for worker in workers.values():
            worker.close()
    return result


def alternate(
    run: Run, contestants: Sequence[Contestant], rounds: int, console: Console
) -> dict[str, Any]:
    """Warm up, then let every contestant have a turn in each round."""
    dtypes = dict.fromkeys(c.dtype for c in contestants if c.structures is not None)
    products = largest_products(run.shapes)
    rates: dict[str, dict[str, list[float]]] = {"machine": {}, "products": {}}
    with Progress(console=console) as progress:
        task = progress.add_task("warm-up", total=(rounds + 1) * len(contestants))
        measured = []
        for contestant in contestants:
            progress.update(task, description=f"warm-up: {contestant.label}")
            measured.append(run.add(contestant))
            progress.advance(task)
        if measured[0].error:
            raise WorkerError(measured[0].error)
        for number in range(rounds):
            # Back and forth: nobody always follows the same neighbour.
            for m in measured if number % 2 == 0 else reversed(measured):
                label = f"round {number + 1} of {rounds}: {m.contestant.label}"
                progress.update(task, description=label)
                run.turn(m)
                progress.advance(task)
            roof = run.workers["ours"].ask(
                "roof", products=products, dtypes=list(dtypes)
            )
            for kind, found in roof.items():
                for name, rate in found.items():
                    rates[kind].setdefault(name, []).append(round(rate, 2))
    return rates | {"contestants": [m.record() for m in measured]}


def grow(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Time networks that grow, and fit how the cost of a step grows with them."""
    chosen = choose(args.only, args.structure or GROWN, args.dtype, args.T)
    contestants = [UNIT, *(c for c in chosen if c.package == "ours")]
    cases = [(grown, n) for grown, sizes in GROWTH.items() for n in sizes]
    result: dict[str, Any] = {
        "environment": environment.describe(args.threads, args.device),
        "rounds": args.rounds,
        "scaling": [Measured(c).record() | {"growth": {}} for c in contestants],
    }
    worker = Worker(environment.ROOT, args.threads, args.device)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("scaling", total=len(cases))
            for grown, size in cases:
                progress.update(task, description=f"{grown}: {size}")
                run = Run({"ours": worker}, GROWTH[grown][size], args.turn_seconds)
                measured = [run.add(c) for c in contestants]
                for _ in range(args.rounds):
                    for m in measured:
                        run.turn(m)
                for m, record in zip(measured, result["scaling"], strict=True):
                    record["error"] = record["error"] or m.error
                    of_size = {"size": size, "rounds": m.rounds}
                    record["growth"].setdefault(grown, []).append(of_size)
                progress.advance(task)
    finally:
        worker.close()
    for record in result["scaling"]:
        for name in ("bytes", "peak", "work", "rounds"):  # of one size only
            del record[name]
        record["exponents"] = {
            grown: results.exponent(*results.growth(record, grown))
            for grown in GROWTH
            if not record["error"]
        }
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Time step() of SIRFShampoo, the official package, and what else "
        "one would take. Contestants take turns; every timed step gets a fresh "
        "gradient. Writes JSON, which `python -m benchmarks.report` turns into tables. "
        "Without options: the quick set, which is all contestants on gpt256.",
    )
    add = parser.add_argument
    add(
        "--workload",
        nargs="+",
        choices=[*WORKLOADS, "all"],
        default=["gpt256"],
        metavar="NAME",
        help=f"one or more of {', '.join(WORKLOADS)}, or all; default: gpt256",
    )
    add("--scaling", action="store_true", help="grow layers and width instead")
    add("--only", default="", metavar="REGEX", help="contestants, see --list")
    add(
        "--structure",
        nargs="+",
        default=[],
        help="of ours, in place of the contestants listed: diagonal, dense, "
        "block64diagonal, ..., or mixed (dense matrices, diagonal vectors)",
    )
    add(
        "--dtype",
        nargs="+",
        default=[],
        choices=["float16", "bfloat16", "float32", "float64"],
        help="of factors; default: as listed, float32 with --structure",
    )
    add(
        "--T",
        nargs="+",
        type=int,
        default=[],
        help="steps between updates; default: as listed, 1 with --structure",
    )
    add("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    add("--list", action="store_true", help="list the contestants chosen, then stop")
    add("--rounds", type=int, default=5, help="turns of each, default: %(default)s")
    add("--turn-seconds", type=float, default=0.2, help="aim; 2 to 10 steps")
    add("--threads", type=int, default=environment.cores(), help="default: %(default)s")
    add(
        "--official",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the official package too, default: yes; it is installed into "
        "build/ if missing",
    )
    add(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure optimizers of pytorch-optimizer and heavyball too, likewise",
    )
    add("--official-folder", type=Path, help="where it is installed already")
    add("--name", help="name of the JSON file; the workload if not given")
    add("--results", type=Path, default=results.RESULTS, help="folder of the file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1 or min(args.T, default=1) < 1:
        parser.error("--rounds, --threads and --T must be at least 1.")
    if "all" in args.workload:
        args.workload = [name for name in WORKLOADS if name != "tiny"]
    if args.name and len(args.workload) > 1:
        parser.error("--name is for one workload.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save; return 1 if a contestant failed."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.list:
        chosen = choose(args.only, args.structure, args.dtype, args.T)
        console.print("\n".join(c.label for c in chosen), markup=False)
        return 0
    if args.scaling:
        grown = grow(args, console)
        keep(grown, args.name or "scaling", args, console)
        console.print(tables.scaling(grown).rich("Growth"))
        return int(any(record["error"] for record in grown["scaling"]))
    failed = []
    for workload in args.workload:
        result = measure(workload, args, console)
        keep(result, args.name or workload, args, console)
        tables.show(result, console)
        tried = [*result["contestants"], *result["agreement"]]
        failed += [x for x in tried if x["error"]]
    console.print("Now `python -m benchmarks.report`.")
    return int(bool(failed))


def keep(
    result: dict[str, Any], name: str, args: argparse.Namespace, console: Console
) -> None:
    """Save a measurement."""
    path = args.results / f"{name}.json"
    results.save(result, path)
    console.print(f"Saved {os.path.relpath(path)}.")


if __name__ == "__main__":
    sys.exit(main())
