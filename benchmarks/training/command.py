"""The command `python -m benchmarks.train`: searches, trains, times, saves."""

import argparse
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import environment, results
from benchmarks.training import clock, pictures, pool, summary, tables, trial
from benchmarks.training.builders import edition, folders
from benchmarks.training.spaces import CONTESTANTS, MAIN
from benchmarks.training.store import Store
from benchmarks.training.tasks import QUICK, TASKS

Specs = dict[str, list[dict[str, Any]]]
"""By name of the contestant, what is to be run."""

RESULTS = results.RESULTS / "train"
STORE = environment.ROOT / "build" / "train"
QUICK_RESULTS = STORE / "quick"
FACTORS = (0.5, 1.0, 2.0)
TRIALS, SEEDS, ROUNDS = 10, 3, 2
QUICK_TRIALS = 3


class Failures(RuntimeError):
    """Runs ended by an error that is no divergence."""


def search_specs(task: str, names: Iterable[str], args: argparse.Namespace) -> Specs:
    """Describe the trials of the search: as many for each who has a space."""
    return {
        name: [
            trial.spec_of(
                task,
                CONTESTANTS[name].builder,
                CONTESTANTS[name].draw(task, name, number),
                seed=trial.SEARCH_SEED,
                steps=args.steps,
                batch_size=args.batch_size,
            )
            for number in range(args.trials)
        ]
        for name in names
        if CONTESTANTS[name].searched
    }


def final_specs(
    task: str, settings: Mapping[str, Any], args: argparse.Namespace
) -> Specs:
    """Describe the runs on other seeds, of fixed settings with other rates, too."""
    specs: Specs = {}
    for name, chosen in settings.items():
        if chosen is None:  # all trials diverged
            continue
        searched = CONTESTANTS[name].searched
        specs[name] = [
            trial.spec_of(
                task,
                CONTESTANTS[name].builder,
                chosen,
                seed=trial.SEARCH_SEED + 1 + number,
                steps=args.steps,
                batch_size=args.batch_size,
                lr_factor=factor,
            )
            for factor in ((1.0,) if searched else args.lr_factors)
            for number in range(args.seeds)
        ]
    return specs


class Driver:
    """Runs what is missing on one task."""

    def __init__(self, store: Store, jobs: int, progress: Progress, bar: Any) -> None:
        """Keep where runs are kept, and where progress is shown."""
        self.store, self.jobs, self.progress, self.bar = store, jobs, progress, bar

    def run(self, specs: Specs, curve: bool) -> dict[str, list[dict[str, Any]]]:
        """Return the records of all runs; those that are finished are not run again.

        Contestants take turns, so that a run that is stopped early is fair, too.

        Raises:
            Failures: If something else than divergence ended a run.
        """
        rounds = max(map(len, specs.values()), default=0)
        turns = [
            (n, s[i]) for i in range(rounds) for n, s in specs.items() if i < len(s)
        ]
        missing = [(n, spec) for n, spec in turns if self.store.find(spec) is None]
        self.progress.advance(self.bar, len(turns) - len(missing))
        work = _trial_with_curve if curve else _trial
        failures = []
        for i, record, error in pool.each(work, [s for _, s in missing], self.jobs):
            name, _ = missing[i]
            self.progress.advance(self.bar)
            if error is not None:
                failures.append(f"{name}: {str(error).strip().splitlines()[-1]}")
                self.progress.console.print(f"{name}: {error}", markup=False)
                continue
            self.store.add(record)
            shown = record["diverged"] or f"validation {record['val']:.4g}"
            self.progress.update(self.bar, description=f"{record['task']}: {name}")
            self.progress.console.print(
                f"{record['task']}: {name}: {shown}, {record['seconds']:.1f} s",
                markup=False,
                highlight=False,
            )
        if failures:
            raise Failures("; ".join(dict.fromkeys(failures)))
        return {n: [self.store.find(x) or {} for x in s] for n, s in specs.items()}

    def clock(self, specs: Mapping[str, Any], rounds: int) -> dict[str, Any]:
        """Return the time of whole runs, measured together or found so."""
        named = {
            name: [trial.key_of(spec), edition(spec["builder"])]
            for name, spec in specs.items()
        }
        key = trial.key_of({"rounds": rounds, "specs": named})
        found = self.store.find_clock(key)
        if found is None:
            load = os.getloadavg()[0]
            found = {
                "rounds": rounds,
                "load_at_start": round(load, 2),
                **clock.measure(
                    specs,
                    rounds,
                    lambda name: self.progress.update(
                        self.bar, description=f"in turns: {name}"
                    ),
                ),
            }
            self.store.add_clock(key, found)
        self.progress.advance(self.bar)
        return found


def _trial(connection: Connection, spec: dict[str, Any], curve: bool = False) -> None:
    """Make a run in a process of its own."""
    record = trial.run(spec, curve, after_step=pool.end_if_alone)
    connection.send(("result", record))


def _trial_with_curve(connection: Connection, spec: dict[str, Any]) -> None:
    _trial(connection, spec, curve=True)


def result_name(task: str, args: argparse.Namespace) -> str:
    """Name the result file: runs of another length or batch size have their own."""
    steps = f"-{args.steps}steps" if args.steps else ""
    return task + steps + (f"-B{args.batch_size}" if args.batch_size else "")


def train(
    task: str, names: Sequence[str], args: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Search, run the winners on other seeds, time them; return the result."""
    data = TASKS[task].load()
    name = result_name(task, args)
    path = args.results / f"{name}.json"
    before = results.load(path) if path.exists() else {"entries": []}
    if before["entries"] and before["data"]["hash"] != data.hash:
        raise Failures(f"{path} has results on other data; move it away.")
    searches = search_specs(task, names, args)
    expected = sum(map(len, searches.values())) + 1
    expected += sum(
        args.seeds * (1 if CONTESTANTS[n].searched else len(args.lr_factors))
        for n in names
    )
    bar = progress.add_task(task, total=expected)
    store = Store(args.store / f"{task}.jsonl", data.hash)
    if args.fresh:
        store.forget([spec for specs in searches.values() for spec in specs])
    driver = Driver(store, args.jobs, progress, bar)
    trials = driver.run(searches, curve=False)
    settings = {n: _settings(n, trials.get(n, [])) for n in names}
    finals = final_specs(task, settings, args)
    if args.fresh:
        store.forget([spec for specs in finals.values() for spec in specs])
    runs = driver.run(finals, curve=True)
    fresh = {
        n: summary.entry(
            n, CONTESTANTS[n], settings[n], trials.get(n, []), runs.get(n, [])
        )
        for n in names
    }
    steps = args.steps or TASKS[task].steps
    result = {
        "name": name,
        "title": TASKS[task].title,
        "steps": steps,
        "batch_size": args.batch_size or TASKS[task].batch_size,
        "points": trial.points(steps),
        "data": {"origin": data.origin, "hash": data.hash}
        | {part: len(getattr(data, part)) for part in ("train", "val", "test")},
        "environment": environment.describe(threads=1),
        "jobs": args.jobs,
        "clock": before.get("clock"),
        "entries": _merge(before["entries"], fresh),
    }
    if args.rounds:
        _add_seconds(result, task, driver, args)
    progress.update(bar, completed=expected, description=f"{task}: done")
    results.save(result, path)
    pictures.draw(result, path.with_suffix(".png"))
    return result


def _builders_before(tasks: Iterable[str], args: argparse.Namespace) -> Iterator[str]:
    """Yield who built the contestants that the result files hold already."""
    for task in tasks:
        path = args.results / f"{result_name(task, args)}.json"
        if path.exists():
            yield from (entry["builder"] for entry in results.load(path)["entries"])


def _settings(name: str, trials: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the settings that the search has chosen, or the fixed ones."""
    if not CONTESTANTS[name].searched:
        return dict(CONTESTANTS[name].settings)
    best = summary.winner(trials)
    return None if best is None else dict(best["settings"])


def _merge(
    before: Sequence[dict[str, Any]], fresh: Mapping[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Replace contestants that were trained now, keep others, in the listed order."""
    found = {record["name"]: record for record in before} | fresh
    for record in before:  # the same code takes the same time with the same settings
        again = found[record["name"]]
        if all(again[key] == record[key] for key in ("settings", "code")):
            again["seconds"] = record["seconds"]
            again["why_no_seconds"] = record["why_no_seconds"]
    order = {name: i for i, name in enumerate(CONTESTANTS)}
    return [found[n] for n in sorted(found, key=lambda n: order.get(n, math.inf))]


def _add_seconds(
    result: dict[str, Any], task: str, driver: Driver, args: argparse.Namespace
) -> None:
    """Time all who are in the result together, whoever was trained now."""
    specs = {
        entry["name"]: trial.spec_of(
            task,
            entry["builder"],
            entry["settings"],
            seed=trial.SEARCH_SEED + 1,
            steps=args.steps,
            batch_size=args.batch_size,
        )
        for entry in result["entries"]
        if entry["settings"] is not None
    }
    if not specs:
        return
    found = driver.clock(specs, args.rounds)
    result["clock"] = {key: found[key] for key in ("rounds", "load_at_start")}
    for entry in result["entries"]:
        seconds = found["seconds"].get(entry["name"])
        entry["why_no_seconds"] = found["failed"].get(entry["name"])
        entry["seconds"] = seconds and [
            round(summary.interpolate(found["steps"], seconds, point), 4)
            for point in result["points"]
        ]


def positive(text: str) -> int:
    """Read a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number >= 1, got {text!r}")
    return int(text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train",
        description="Train small networks with many optimizers on equal terms: as many "
        "trials of random search for each, chosen on validation data, reported on test "
        "data over several seeds; then time the winners in turns. Finished runs are "
        "kept: the same command goes on where it was stopped, and a longer search "
        "takes over a shorter one. Writes JSON, which `python -m benchmarks.report` "
        "turns into tables and pictures.",
    )
    add = parser.add_argument
    add(
        "--task",
        nargs="+",
        choices=["all", *TASKS],
        default=None,
        metavar="TASK",
        help=f"what to train on: all (default), or {', '.join(TASKS)}",
    )
    add(
        "--contestant",
        nargs="+",
        choices=["all", "main", *CONTESTANTS],
        default=None,
        metavar="NAME",
        help=f"who: main (default), all, or {', '.join(CONTESTANTS)}; others that are "
        "in the result file stay there",
    )
    add("--trials", type=positive, help=f"of the search, default: {TRIALS}")
    add("--seeds", type=positive, default=SEEDS, help="default: %(default)s")
    add("--steps", type=positive, help="default: the task's")
    add("--batch-size", type=positive, help="default: the task's")
    add(
        "--lr-factors",
        nargs="+",
        type=float,
        default=FACTORS,
        help="on the learning rate, for contestants without search; 1 is always "
        "among them; default: ½, 1, 2",
    )
    add(
        "--rounds",
        type=int,
        default=ROUNDS,
        help="of timing, 0 for none; default: %(default)s",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_TRIALS} trials on {', '.join(QUICK)}; results go to "
        f"{QUICK_RESULTS.relative_to(environment.ROOT)}",
    )
    add("--jobs", type=positive, default=environment.cores(), help="default: cores")
    add("--fresh", action="store_true", help="run again what is finished")
    add("--list", action="store_true", help="list who would be trained, then stop")
    add("--results", type=Path, help="folder of the JSON files")
    add("--store", type=Path, default=STORE, help="folder of finished runs")
    args = parser.parse_args(argv)
    if args.rounds < 0:
        parser.error("--rounds must be at least 0.")
    if not all(math.isfinite(f) and f > 0 for f in args.lr_factors):
        parser.error("--lr-factors must be positive numbers.")
    args.lr_factors = sorted({1.0, *args.lr_factors})
    args.task = args.task or (list(QUICK) if args.quick else ["all"])
    args.contestant = args.contestant or ["main"]
    args.trials = args.trials or (QUICK_TRIALS if args.quick else TRIALS)
    args.results = args.results or (QUICK_RESULTS if args.quick else RESULTS)
    return args


def _chosen(asked: Sequence[str], groups: Mapping[str, Iterable[str]]) -> list[str]:
    """Replace the names of groups by their members; each is there once."""
    members = (name for one in asked for name in groups.get(one, (one,)))
    return list(dict.fromkeys(members))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, show and save; return 1 if something failed."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = _chosen(args.contestant, {"all": CONTESTANTS, "main": MAIN})
    tasks = _chosen(args.task, {"all": TASKS})
    if args.list:
        for name in names:
            contestant = CONTESTANTS[name]
            space = ", ".join(f"{k}: {x}" for k, x in contestant.space().items())
            console.print(f"{name}: {contestant.title} ({space})", markup=False)
        return 0
    try:
        # all who will be timed: some packages must be on the path before torch is
        builders = [CONTESTANTS[name].builder for name in names]
        if args.rounds:
            builders += _builders_before(tasks, args)
        pool.prepare(folders(builders))
    except RuntimeError as error:
        console.print(f"A package is missing: {error}", markup=False)
        return 1
    failed = False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for task in tasks:
            try:
                result = train(task, names, args, progress)
            except Failures as failure:
                failed = True
                progress.console.print(f"{task} failed: {failure}", markup=False)
                continue
            progress.console.print(tables.task(result).rich(task))
            progress.console.print(tables.factors([result]).rich("Without search"))
    console.print(f"Saved to {os.path.relpath(args.results)}.")
    if args.results == RESULTS:
        console.print("Now `python -m benchmarks.report`.")
    return int(failed)
