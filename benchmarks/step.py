"""Times `step()` of each contestant: `python -m benchmarks.step --help`."""

import argparse
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import environment, results, tables
from benchmarks.agreement import compare
from benchmarks.contestants import UNIT, Contestant, choose, ours
from benchmarks.processes import WorkFailed
from benchmarks.worker import Worker
from benchmarks.workloads import (
    CONSTRUCTION,
    GROWTH,
    WORKLOADS,
    Shapes,
    largest_products,
    numbers,
)

UNIT_STEPS = 8  # AdamW's share of a turn
TURN_SECONDS = 0.2  # of any other, of 2 to 10 steps
GROWN = ("diagonal", "mixed", "dense")  # what --scaling grows unasked


def record_of(contestant: Contestant) -> dict[str, Any]:
    """Return the entry for the JSON file, before anything is measured."""
    has_factors, has_period = contestant.structures is not None, contestant.has_period
    return {
        "package": contestant.package,
        "title": contestant.title,
        "structures": contestant.structures,
        "dtype": contestant.dtype if has_factors else None,
        "T": contestant.T if has_period else None,
        "bytes": None,
        "peak": None,
        "work": None,
        "error": None,
        "rounds": [],
    }


class Run:
    """One measurement: contestants of both packages take turns, never two at once."""

    def __init__(self, workers: Mapping[str, Worker], shapes: Shapes) -> None:
        self.workers, self.shapes = workers, shapes
        self.steps: dict[str, int] = {}  # of a turn, by label: whole periods of T

    def _worker(self, contestant: Contestant) -> Worker:
        return self.workers[worker_of(contestant)]

    def add(self, contestant: Contestant) -> dict[str, Any]:
        """Warm a contestant up; choose how many steps a turn of it has."""
        record, T = record_of(contestant), contestant.T
        try:
            if contestant.structures is not None:
                record["work"] = self.workers["ours"].call(
                    "work", spec=contestant.spec(), shapes=self.shapes
                )
            answer = self._worker(contestant).call(
                "add",
                key=contestant.label,
                spec=contestant.spec(),
                shapes=self.shapes,
                warmup=max(3, T + 2),
                peak=T,
            )
        except WorkFailed as error:
            return record | {"error": str(error)}
        wanted = 1e3 * TURN_SECONDS / median(answer["ms"][1:])
        self.steps[contestant.label] = T * ceil(min(10, max(2, wanted)) / T)
        return record | {key: answer[key] for key in ("bytes", "peak")}

    def turn(self, contestant: Contestant, record: dict[str, Any]) -> None:
        """Time AdamW, then right after it a contestant."""
        if record["error"]:
            return
        try:
            unit = self.workers["ours"].call("turn", key=UNIT.label, steps=UNIT_STEPS)
            ms = unit
            if contestant != UNIT:
                ms = self._worker(contestant).call(
                    "turn", key=contestant.label, steps=self.steps[contestant.label]
                )
        except WorkFailed as error:
            record["error"] = str(error)
            return
        rounded = {"ms": [round(x, 4) for x in ms]}
        record["rounds"].append(rounded | {"unit_ms": [round(x, 4) for x in unit]})

    def construction(self) -> dict[str, list[float]]:
        """Time the constructors, each used before, on many parameters (seconds)."""
        both = same_name(self.workers)
        times: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(3):
            for name, worker in both.items():
                seconds = worker.call(
                    "construct", spec=ours("dense"), shapes=CONSTRUCTION
                )
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
    workers = {"ours": Worker(environment.ROOT, args.threads)}
    found: dict[str, Any] = {}
    for package in packages:
        try:
            folder = environment.folder_of(package)
            name = environment.IMPORT_NAMES.get(package, "sirfshampoo")
            workers[package] = Worker(folder, args.threads, name)
            versions = workers[package].call("versions")
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
    if args.no_peers:
        packages = {k: None for k in packages if k == "official"}
    workers, found = start(packages, args, console)
    result: dict[str, Any] = {
        "workload": workload,
        "parameters": len(shapes),
        "numbers": numbers(shapes),
        "environment": environment.describe(args.threads),
        "official": found.pop("official", None),
        "peers": found,
    }
    try:
        run = Run(workers, shapes)
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
        records = []
        for contestant in contestants:
            progress.update(task, description=f"warm-up: {contestant.label}")
            records.append(run.add(contestant))
            progress.advance(task)
        if records[0]["error"]:
            raise WorkFailed(records[0]["error"])
        turns = list(zip(contestants, records, strict=True))
        for number in range(rounds):
            # Back and forth: nobody always follows the same neighbour.
            for contestant, record in turns if number % 2 == 0 else reversed(turns):
                label = f"round {number + 1} of {rounds}: {contestant.label}"
                progress.update(task, description=label)
                run.turn(contestant, record)
                progress.advance(task)
            roof = run.workers["ours"].call(
                "roof", products=products, dtypes=list(dtypes)
            )
            for kind, found in roof.items():
                for name, rate in found.items():
                    rates[kind].setdefault(name, []).append(round(rate, 2))
    return rates | {"contestants": records}


def grow(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Time networks that grow, and fit how the cost of a step grows with them."""
    chosen = choose(args.only, args.structure or GROWN, args.dtype, args.T)
    contestants = [UNIT, *(c for c in chosen if c.package == "ours")]
    cases = [(grown, n) for grown, sizes in GROWTH.items() for n in sizes]
    result: dict[str, Any] = {
        "environment": environment.describe(args.threads),
        "rounds": args.rounds,
        "scaling": [record_of(c) | {"growth": {}} for c in contestants],
    }
    worker = Worker(environment.ROOT, args.threads)
    try:
        with Progress(console=console) as progress:
            task = progress.add_task("scaling", total=len(cases))
            for grown, size in cases:
                progress.update(task, description=f"{grown}: {size}")
                run = Run({"ours": worker}, GROWTH[grown][size])
                measured = [run.add(c) for c in contestants]
                for _ in range(args.rounds):
                    for contestant, m in zip(contestants, measured, strict=True):
                        run.turn(contestant, m)
                for m, record in zip(measured, result["scaling"], strict=True):
                    record["error"] = record["error"] or m["error"]
                    of_size = {"size": size, "rounds": m["rounds"]}
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
    add("--list", action="store_true", help="list the contestants chosen, then stop")
    add("--rounds", type=int, default=5, help="turns of each, default: %(default)s")
    add("--threads", type=int, default=environment.cores(), help="default: %(default)s")
    add(
        "--no-peers",
        action="store_true",
        help="leave out the optimizers of pytorch-optimizer and heavyball, which are "
        "installed into build/ if missing, as the official package is",
    )
    add("--results", type=Path, default=results.RESULTS, help="folder of the file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1 or min(args.T, default=1) < 1:
        parser.error("--rounds, --threads and --T must be at least 1.")
    if "all" in args.workload:
        args.workload = [name for name in WORKLOADS if name != "tiny"]
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
        keep(grown, "scaling", args, console)
        console.print(tables.scaling(grown).rich("Growth"))
        return int(any(record["error"] for record in grown["scaling"]))
    failed = []
    for workload in args.workload:
        result = measure(workload, args, console)
        keep(result, workload, args, console)
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
