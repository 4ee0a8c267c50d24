"""The results of one task as they are committed, with statistics drawn from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.training.spaces import Contestant

Record = Mapping[str, Any]
LOSSES = ("train", "val", "test")


def winner(trials: Iterable[Record]) -> Record | None:
    """Return the trial with the lowest validation loss, if any did not diverge."""
    fit = [trial for trial in trials if not trial["diverged"]]
    return min(fit, key=lambda trial: trial["val"], default=None)


def entry(
    name: str,
    contestant: Contestant,
    settings: Mapping[str, Any] | None,
    trials: Sequence[Record],
    runs: Sequence[Record],
) -> dict[str, Any]:
    """Describe what a contestant showed, for the JSON file.

    Settings are the winner's; None if all trials diverged. Runs are those on other
    seeds, and with other learning rates.
    """
    fixed = [k for k, x in contestant.space().items() if x == contestant.settings[k]]
    return {
        "name": name,
        "title": contestant.title,
        "builder": contestant.builder,
        "space": contestant.space(),
        "searched": contestant.searched,
        "settings": settings,
        "code": sorted({record["code"] for record in (*trials, *runs)}),
        "trials": _columns(
            {k: x for k, x in t["settings"].items() if k not in fixed}
            | {"val": t.get("val"), "diverged": t["diverged"]}
            for t in trials
        ),
        "runs": _columns(
            {
                "seed": run["seed"],
                "lr_factor": run["lr_factor"],
                **{key: run.get(key) for key in (*LOSSES, "accuracy")},
                "diverged": run["diverged"],
                "curve": list(run["curve"].values()) if run["lr_factor"] == 1 else [],
            }
            for run in runs
        ),
        "seconds": None,
        "why_no_seconds": None,
    }


def _columns(records: Iterable[Record]) -> dict[str, list[Any]]:
    """Write records with the same keys as lists: the file gets a line for each key."""
    columns: dict[str, list[Any]] = {}
    for record in records:
        for key, value in record.items():
            columns.setdefault(key, []).append(value)
    return columns


def rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Read what `_columns` wrote."""
    lines = zip(*columns.values(), strict=True)
    return [dict(zip(columns, line, strict=True)) for line in lines]


@dataclass(frozen=True)
class Mean:
    """Mean and standard deviation over seeds, of at least one number."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        """Summarize."""
        return cls(
            fmean(values), stdev(values) if len(values) > 1 else 0.0, len(values)
        )


def lowest(means: Mapping[Any, Mean | None]) -> Any:
    """Return the key of the lowest mean, if there is any."""
    fit = {key: mean.mean for key, mean in means.items() if mean is not None}
    return min(fit, key=lambda key: fit[key], default=None)


class Entry:
    """A contestant's results on one task, read from the JSON file."""

    def __init__(self, record: Record, points: Sequence[int]) -> None:
        """Read what `entry` returned, with the steps that curves were looked at."""
        self.record, self.points = record, points
        self.name, self.title = record["name"], record["title"]
        self.seconds: list[float] | None = record["seconds"]
        self.trials, self.all_runs = rows(record["trials"]), rows(record["runs"])

    def runs(self, lr_factor: float = 1.0) -> list[dict[str, Any]]:
        """Return the runs on other seeds with one learning rate."""
        return [r for r in self.all_runs if r["lr_factor"] == lr_factor]

    def factors(self) -> list[float]:
        """Return the factors on the learning rate that were tried."""
        return sorted({run["lr_factor"] for run in self.all_runs})

    def mean(self, what: str, lr_factor: float = 1.0) -> Mean | None:
        """Summarize a loss, or the accuracy, over the runs that did not diverge."""
        found = [r[what] for r in self.runs(lr_factor) if not r["diverged"]]
        found = [x for x in found if x is not None]
        return Mean.of(found) if found else None

    def diverged(self, lr_factor: float | None = None) -> tuple[int, int]:
        """Count the runs that diverged, and all runs; with any factor if None."""
        runs = self.all_runs if lr_factor is None else self.runs(lr_factor)
        return sum(bool(run["diverged"]) for run in runs), len(runs)

    def diverged_trials(self) -> tuple[int, int]:
        """Count the trials of the search that diverged, and all trials."""
        failed = sum(bool(trial["diverged"]) for trial in self.trials)
        return failed, len(self.trials)

    def curves(self) -> list[list[float]]:
        """Return the test losses at the points, of each run that did not diverge."""
        return [run["curve"] for run in self.runs() if not run["diverged"]]

    def curve(self) -> list[float]:
        """Return the mean over seeds of the test losses at the points."""
        return [fmean(losses) for losses in zip(*self.curves(), strict=True)]

    def best(self) -> float:
        """Return the lowest test loss along the mean curve."""
        return min(self.curve(), default=-math.inf)

    def steps_to(self, loss: float) -> float:
        """Return after how many steps the mean curve reaches a loss.

        Between two points the curve counts as straight. Infinite if it is not reached,
        or if half of the runs diverged.
        """
        failed, tried = self.diverged(1.0)
        if 2 * failed >= tried:
            return math.inf
        return first_below(self.points, self.curve(), loss)

    def ms(self) -> float | None:
        """Return the milliseconds of a training step, in the mean over a run."""
        return self.seconds and 1e3 * self.seconds[-1] / self.points[-1]

    def seconds_at(self, step: float) -> float | None:
        """Return how long training takes until a step."""
        if self.seconds is None or math.isinf(step):
            return None
        return float(np.interp(step, self.points, self.seconds))


def entries(result: Mapping[str, Any]) -> list[Entry]:
    """Read all contestants of a task."""
    return [Entry(record, result["points"]) for record in result["entries"]]


def first_below(points: Sequence[float], curve: Sequence[float], loss: float) -> float:
    """Return where a curve, straight between its points, first meets a value."""
    if curve[0] <= loss:
        return points[0]
    for i in range(1, len(curve)):
        if curve[i] <= loss:
            share = (curve[i - 1] - loss) / (curve[i - 1] - curve[i])
            return points[i - 1] + share * (points[i] - points[i - 1])
    return math.inf
