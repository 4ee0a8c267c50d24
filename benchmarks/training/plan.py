"""What one task needs: its runs, and what their records are turned into."""

import argparse
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import environment, results
from benchmarks.training import summary, trial
from benchmarks.training.spaces import CONTESTANTS
from benchmarks.training.store import Store
from benchmarks.training.tasks import TASKS

Specs = dict[str, list[dict[str, Any]]]
"""By name of the contestant, what is to be run."""

Clock = Callable[[Store, Mapping[str, Any]], dict[str, Any]]
"""Times whole runs, by name of the contestant."""


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


def result_name(task: str, args: argparse.Namespace) -> str:
    """Name the result file: runs of another length or batch size have their own."""
    steps = f"-{args.steps}steps" if args.steps else ""
    return task + steps + (f"-B{args.batch_size}" if args.batch_size else "")


class Plan:
    """What is to be done on one task."""

    def __init__(
        self, task: str, names: Sequence[str], args: argparse.Namespace
    ) -> None:
        """Load the data, and what is there of results and runs.

        Raises:
            Failures: If there are results on other data.
        """
        self.task, self.names, self.args = task, names, args
        self.data = TASKS[task].load()
        self.path = args.results / f"{result_name(task, args)}.json"
        self._before = results.load(self.path) if self.path.exists() else None
        if self._before and self._before["data"]["hash"] != self.data.hash:
            raise Failures(f"{self.path} has results on other data; move it away.")
        self.store = Store(args.store / f"{task}.jsonl", self.data.hash)
        self.searches = search_specs(task, names, args)
        self.bar: Any = None  # where progress is shown
        self.failures: list[str] = []  # what ended runs, if it was no divergence
        self._finals: Specs | None = None
        if args.fresh:
            self._forget(self.searches)

    @property
    def expected(self) -> int:
        """How many steps the bar has at most."""
        finals = self.args.seeds * sum(
            1 if CONTESTANTS[name].searched else len(self.args.lr_factors)
            for name in self.names
        )
        return sum(map(len, self.searches.values())) + finals + 1

    @property
    def finals(self) -> Specs:
        """The runs on other seeds, once the searches are done."""
        if self._finals is None:
            self._finals = final_specs(self.task, self._settings(), self.args)
            if self.args.fresh:
                self._forget(self._finals)
        return self._finals

    def result(self, clock: Clock) -> dict[str, Any]:
        """Return what goes into the file, once all runs are done."""
        args, task, data = self.args, TASKS[self.task], self.data
        trials, runs = self._records(self.searches), self._records(self.finals)
        settings = self._settings()
        fresh = {
            n: summary.entry(
                n, CONTESTANTS[n], settings[n], trials.get(n, []), runs.get(n, [])
            )
            for n in self.names
        }
        before = self._before or {"entries": []}
        steps = args.steps or task.steps
        result = {
            "name": result_name(self.task, args),
            "title": task.title,
            "steps": steps,
            "batch_size": args.batch_size or task.batch_size,
            "points": trial.points(steps),
            "data": {"origin": data.origin, "hash": data.hash}
            | {part: len(getattr(data, part)) for part in ("train", "val", "test")},
            "environment": environment.describe(threads=1),
            "jobs": args.jobs,
            "clock": before.get("clock"),
            "entries": _merge(before["entries"], fresh),
        }
        if args.rounds:
            self._add_seconds(result, clock)
        return result

    def _forget(self, specs: Specs) -> None:
        self.store.forget([spec for found in specs.values() for spec in found])

    def _records(self, specs: Specs) -> dict[str, list[dict[str, Any]]]:
        return {n: [self.store.find(x) or {} for x in s] for n, s in specs.items()}

    def _settings(self) -> dict[str, dict[str, Any] | None]:
        """Return the settings that the searches have chosen, or the fixed ones."""
        trials = self._records(self.searches)
        return {name: _settings(name, trials.get(name, [])) for name in self.names}

    def _add_seconds(self, result: dict[str, Any], clock: Clock) -> None:
        """Time all who are in the result together, whoever was trained now."""
        specs = {
            entry["name"]: trial.spec_of(
                self.task,
                entry["builder"],
                entry["settings"],
                seed=trial.SEARCH_SEED + 1,
                steps=self.args.steps,
                batch_size=self.args.batch_size,
            )
            for entry in result["entries"]
            if entry["settings"] is not None
        }
        if not specs:
            return
        found = clock(self.store, specs)
        result["clock"] = {key: found[key] for key in ("rounds", "load_at_start")}
        for entry in result["entries"]:
            seconds = found["seconds"].get(entry["name"])
            entry["why_no_seconds"] = found["failed"].get(entry["name"])
            entry["seconds"] = seconds and [
                round(x, 4)
                for x in np.interp(result["points"], found["steps"], seconds).tolist()
            ]


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
