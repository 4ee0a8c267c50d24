"""The command `python -m benchmarks.train`: searches, trains, times, saves."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from benchmarks import results
from benchmarks.optimizers import edition, folders
from benchmarks.processes import end_if_alone
from benchmarks.training import clock, pictures, pool, tables, trial
from benchmarks.training.options import RESULTS, parse
from benchmarks.training.plan import Failures, Plan, Specs, result_name
from benchmarks.training.spaces import CONTESTANTS, MAIN
from benchmarks.training.store import Store
from benchmarks.training.tasks import MADE_ON


class Driver:
    """Does what is missing."""

    def __init__(self, args: argparse.Namespace, progress: Progress) -> None:
        self.args, self.progress = args, progress

    def train(self, tasks: Sequence[str], names: Sequence[str]) -> bool:
        """Search, run the winners on other seeds, time them; save, and show.

        Returns:
            Whether all went well. What fails on one task does not stop the others.
        """
        plans = []
        for task in tasks:
            try:
                plans.append(Plan(task, names, self.args))
            except Failures as failure:
                self._print(f"{task} failed: {failure}")
                continue
            plans[-1].bar = self.progress.add_task(task, total=plans[-1].expected)
        self.run([(plan, plan.searches) for plan in plans], curve=False)
        fit = [plan for plan in plans if not plan.failures]
        self.run([(plan, plan.finals) for plan in fit], curve=True)
        for plan in plans:
            if plan.failures:
                told = "; ".join(dict.fromkeys(plan.failures))
                self._print(f"{plan.task} failed: {told}")
                continue
            result = plan.result(partial(self._clock, plan.bar))
            self.progress.update(
                plan.bar, completed=plan.expected, description=f"{plan.task}: done"
            )
            results.save(result, plan.path)
            pictures.draw(result, plan.path.with_suffix(".png"))
            self.progress.console.print(tables.task(result).rich(plan.task))
            self.progress.console.print(tables.factors([result]).rich("Without search"))
        return len(plans) == len(tasks) and not any(plan.failures for plan in plans)

    def run(self, wanted: Sequence[tuple[Plan, Specs]], curve: bool) -> None:
        """Make the runs that are not finished; note in the plans what failed."""
        missing = [
            (plan, name, spec)
            for plan, specs in wanted
            for name, spec in _turns(specs)
            if plan.store.find(spec) is None
        ]
        for plan, specs in wanted:
            left = sum(plan is other for other, *_ in missing)
            everything = sum(map(len, specs.values()))
            self.progress.advance(plan.bar, everything - left)
        work = _trial_with_curve if curve else _trial
        runs = [spec for *_, spec in missing]
        for i, record, error in pool.each(work, runs, self.args.jobs):
            plan, name, _ = missing[i]
            self.progress.advance(plan.bar)
            if error is not None:
                plan.failures.append(f"{name}: {str(error).strip().splitlines()[-1]}")
                self._print(f"{plan.task}: {name}: {error}")
                continue
            plan.store.add(record)
            shown = record["diverged"] or f"validation {record['val']:.4g}"
            self.progress.update(plan.bar, description=f"{plan.task}: {name}")
            self._print(f"{plan.task}: {name}: {shown}, {record['seconds']:.1f} s")

    def _print(self, text: str) -> None:
        self.progress.console.print(text, markup=False, highlight=False)

    def _clock(
        self, bar: Any, store: Store, specs: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the time of whole runs, measured together or found so."""
        rounds = self.args.rounds
        named = {
            name: [trial.key_of(spec), edition(spec["builder"])]
            for name, spec in specs.items()
        }
        key = trial.key_of({"rounds": rounds, "specs": named})
        found = store.find_clock(key)
        if found is None:
            load = os.getloadavg()[0]
            found = {
                "rounds": rounds,
                "load_at_start": round(load, 2),
                **clock.measure(
                    specs,
                    rounds,
                    lambda name: self.progress.update(
                        bar, description=f"in turns: {name}"
                    ),
                ),
            }
            store.add_clock(key, found)
        self.progress.advance(bar)
        return found


def _turns(specs: Specs) -> Iterator[tuple[str, dict[str, Any]]]:
    """Let contestants take turns: a run that is stopped early is fair, too."""
    for i in range(max(map(len, specs.values()), default=0)):
        yield from ((name, found[i]) for name, found in specs.items() if i < len(found))


def _trial(connection: Connection, spec: dict[str, Any], curve: bool = False) -> None:
    """Make a run in a process of its own."""
    record = trial.run(spec, curve, after_step=end_if_alone)
    connection.send(("result", record))


def _trial_with_curve(connection: Connection, spec: dict[str, Any]) -> None:
    _trial(connection, spec, curve=True)


def _builders_before(tasks: Iterable[str], args: argparse.Namespace) -> Iterator[str]:
    """Yield who built the contestants that the result files hold already."""
    for task in tasks:
        path = args.results / f"{result_name(task, args)}.json"
        if path.exists():
            yield from (entry["builder"] for entry in results.load(path)["entries"])


def _chosen(asked: Sequence[str], groups: Mapping[str, Iterable[str]]) -> list[str]:
    """Replace the names of groups by their members; each is there once."""
    members = (name for one in asked for name in groups.get(one, (one,)))
    return list(dict.fromkeys(members))


def main(argv: Sequence[str] | None = None) -> int:
    """Train, show and save; return 1 if something failed."""
    args = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 160)
    names = _chosen(args.contestant, {"all": CONTESTANTS, "main": MAIN})
    tasks = _chosen(args.task, {"all": MADE_ON})
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        driver = Driver(args, progress)
        parts = [tasks] if args.held_out else [[task] for task in tasks]
        failed = [not driver.train(part, names) for part in parts]
    console.print(f"Saved to {os.path.relpath(args.results)}.")
    if args.results == RESULTS:
        console.print("Now `python -m benchmarks.report`.")
    return int(any(failed))
