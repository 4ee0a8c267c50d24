"""Times `step()` of each contestant: `python -m benchmarks.step --help`."""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import environment, results, tables
from benchmarks.agreement import compare
from benchmarks.contestants import AGAINST_OFFICIAL, CONTESTANTS, UNIT, Contestant
from benchmarks.process import Worker, WorkerError
from benchmarks.workloads import CONSTRUCTION, WORKLOADS, Shapes, numbers

UNIT_STEPS = 8  # AdamW's share of a turn


@dataclass
class Measured:
    """What has been measured of one contestant so far."""

    contestant: Contestant
    bytes: int | None = None
    steps: int = 0  # timed steps in a turn: whole periods of T
    rounds: list[dict[str, list[float]]] = field(default_factory=list)
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the entry for the JSON file."""
        has_factors = self.contestant.structures is not None
        return {
            "package": self.contestant.package,
            "title": self.contestant.title,
            "structures": self.contestant.structures,
            "dtype": self.contestant.dtype if has_factors else None,
            "T": self.contestant.T if has_factors else None,
            "bytes": self.bytes,
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
        return self.workers["official" if contestant.package == "official" else "ours"]

    def add(self, contestant: Contestant) -> Measured:
        """Warm a contestant up; choose how many steps a turn of it has."""
        measured, T = Measured(contestant), contestant.T
        try:
            answer = self._worker(contestant).ask(
                "add",
                key=contestant.label,
                spec=contestant.spec(),
                shapes=self.shapes,
                warmup=max(3, T + 2),
            )
        except WorkerError as error:
            measured.error = str(error)
            return measured
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
        times: dict[str, list[float]] = {name: [] for name in self.workers}
        for _ in range(3):
            for name, worker in self.workers.items():
                seconds = worker.ask("construct", spec=spec, shapes=CONSTRUCTION)
                times[name].append(round(seconds, 4))
        return times


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything that the command line asks for."""
    shapes = WORKLOADS[args.workload]()
    result: dict[str, Any] = {
        "workload": args.workload,
        "parameters": len(shapes),
        "numbers": numbers(shapes),
        "environment": environment.describe(args.threads),
        "official": None,
    }
    workers = {"ours": Worker(environment.ROOT, args.threads)}
    try:
        try:
            if args.official:
                folder = args.official_folder or environment.official_folder()
                workers["official"] = Worker(folder, args.threads)
                result["official"] = workers["official"].versions
        except (RuntimeError, OSError) as error:
            result["official"] = f"not measured: {error}"
            console.print(f"[yellow]official package {result['official']}")
        run = Run(workers, shapes, args.turn_seconds)
        chosen = [
            c
            for c in CONTESTANTS
            if re.search(args.only, c.label)
            and (c.package != "official" or "official" in workers)
        ]
        result |= alternate(run, [UNIT, *chosen], args.rounds, console)
        result["construction"] = {"parameters": len(CONSTRUCTION)}
        result["construction"]["seconds"] = run.construction()
        result["agreement"] = [
            compare(workers, shapes, T)
            for T in AGAINST_OFFICIAL
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
    roof: dict[str, list[float]] = {}
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
            for name, rate in run.workers["ours"].ask("roof").items():
                roof.setdefault(name, []).append(round(rate, 2))
    return {"machine": roof, "contestants": [m.record() for m in measured]}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Time step() of SIRFShampoo, AdamW and the official package. "
        "Contestants take turns; every timed step gets a fresh gradient. "
        "Writes JSON, which `python -m benchmarks.report` turns into tables.",
    )
    add = parser.add_argument
    add("--workload", choices=WORKLOADS, default="gpt256", help="default: %(default)s")
    add("--only", default="", metavar="REGEX", help="contestants, see --list")
    add("--list", action="store_true", help="list the contestants, then stop")
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
    add("--official-folder", type=Path, help="where it is installed already")
    add("--name", help="name of the JSON file; the workload if not given")
    add("--results", type=Path, default=results.RESULTS, help="folder of the file")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1.")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, show and save; return 1 if a contestant failed."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.list:
        console.print("\n".join(c.label for c in CONTESTANTS), markup=False)
        return 0
    result = measure(args, console)
    path = args.results / f"{args.name or args.workload}.json"
    results.save(result, path)
    tables.show(result, console)
    console.print(f"Saved {os.path.relpath(path)}; now `python -m benchmarks.report`.")
    failed = [c for c in [*result["contestants"], *result["agreement"]] if c["error"]]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
