"""The tables of the training benchmark."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.optimizers import OURS
from benchmarks.tables import Grid, where
from benchmarks.training.spaces import CONTESTANTS, ON_HELD_OUT, UNIT
from benchmarks.training.summary import Entry, Mean, entries, lowest
from benchmarks.training.tasks import HELD_OUT, TASKS

Result = Mapping[str, Any]


def task(result: Result) -> Grid:
    """Tell what every contestant reached on one task, and how fast."""
    header = (
        result["title"],
        "test loss",
        "validation",
        "training",
        "accuracy",
        "diverged: search, runs",
        "ms per step",
        "steps to AdamW's best",
        "seconds to it",
    )
    found = entries(result)
    unit = next((e for e in found if e.name == UNIT), None)
    target = unit.best() if unit else -math.inf
    lines = [
        (
            e.title + ("" if e.record["searched"] else " (no search)"),
            *(_mean(e.mean(what)) for what in ("test", "val", "train")),
            _accuracy(e.mean("accuracy")),
            f"{_share(e.diverged_trials())}, {_share(e.diverged(1.0))}",
            "–" if e.ms() is None else f"{e.ms():.2f}",
            *_reached(e, target),
        )
        for e in found
    ]
    best = lowest({i: e.mean("test") for i, e in enumerate(found)})
    if best is not None:
        title, loss, *rest = lines[best]
        lines[best] = (title, f"**{loss}**", *rest)
    return Grid(header, lines, task_notes(result))


def _mean(mean: Mean | None) -> str:
    """Format mean ± standard deviation."""
    if mean is None:
        return "diverged"
    spread = f" ± {mean.deviation:.2g}" if mean.n > 1 else ""
    return f"{mean.mean:.4g}{spread}"


def _accuracy(mean: Mean | None) -> str:
    return "–" if mean is None else f"{mean.mean:.1f} %"


def _share(counts: tuple[int, int]) -> str:
    """Format how many of how many."""
    return f"{counts[0]} of {counts[1]}" if counts[1] else "–"


def _reached(e: Entry, target: float) -> tuple[str, str]:
    """Format when a loss was reached."""
    steps = e.steps_to(target)
    seconds = e.seconds_at(steps)
    return (
        "–" if math.isinf(steps) else f"{steps:.0f}",
        "–" if seconds is None else f"{seconds:.2f}",
    )


def task_notes(result: Result) -> list[str]:
    """Say how one task was trained, measured and timed."""
    found = entries(result)
    trials = sorted({len(e.trials) for e in found if e.record["searched"]})
    searched = " or ".join(map(str, trials)) if trials else "no"
    seeds = sorted({len(e.runs()) for e in found})
    notes = [
        f"{where(result['environment'])} Data: {result['data']['origin']} "
        f"({result['data']['hash']}); {result['steps']} steps of "
        f"{result['batch_size']} examples; warm-up over a tenth, then a cosine. "
        f"{searched} trials of random search each (`benchmarks/training/spaces.py`), "
        "chosen by validation loss; losses are means ± standard deviations over "
        f"{' or '.join(map(str, seeds))} other seeds, without diverged runs."
    ]
    if len(trials) > 1:
        notes.append("**Not all had as many trials**: do not compare these.")
    clock = result.get("clock")
    if clock:
        notes.append(
            f"Seconds: trained once more in turns, alone, one thread, the fastest of "
            f"{clock['rounds']} rounds; load before {clock['load_at_start']:.1f}."
        )
        notes += [clock["remark"]] if "remark" in clock else []
    ours = [e.record for e in found if e.record["builder"] in OURS]
    codes = {code for record in ours for code in record["code"]}
    if len(codes) > 1:
        notes.append(
            f"This package was not the same for all: {', '.join(sorted(codes))}."
        )
    return notes


@dataclass(frozen=True)
class Sections:
    """A text with a heading, a picture and a table for each task."""

    results: Sequence[Result]

    def markdown(self) -> str:
        """Return the text; pictures lie beside the results."""
        parts = []
        for result in self.results:
            name = result["name"]
            parts += [
                f"### {name}: {result['title']}\n",
                f"![Test loss by step and by second](results/train/{name}.png)\n",
                task(result).markdown() + "\n",
            ]
        return "\n".join(parts)


def all_tasks(results: Sequence[Result]) -> Grid:
    """Tell the test loss of every contestant on every task."""
    return _matrix(
        results,
        lambda e: e.mean("test"),
        "Test losses, means over seeds (± standard deviation), the lowest in bold. "
        "–: not tried.",
    )


def all_training(results: Sequence[Result]) -> Grid:
    """Tell the training loss of every contestant on every task."""
    return _matrix(
        results,
        lambda e: e.mean("train"),
        "Training losses at the end of the same runs, the lowest in bold.",
    )


def held_out(results: Sequence[Result]) -> Grid:
    """Tell the test loss on every held-out task, also on those that were not run."""
    found = {r["name"]: {e.name: e for e in entries(r)} for r in results}
    lines = []
    for name in HELD_OUT:
        there = found.get(name, {})
        means = {who: e.mean("test") for who, e in there.items()}
        best = lowest({who: means.get(who) for who in ON_HELD_OUT})
        cells = {who: _held_out_cell(there.get(who)) for who in ON_HELD_OUT}
        if best is not None and len(there) > 1:
            cells[best] = f"**{cells[best]}**"
        lines.append((f"{name}: {TASKS[name].title}", *cells.values()))
    titles = (CONTESTANTS[who].title for who in ON_HELD_OUT)
    notes = [
        "Test losses, means over seeds ± standard errors, the lowest in bold where "
        "several were run."
    ]
    if results:
        notes.append(_how_held_out(found))
        notes += dict.fromkeys(where(r["environment"]) for r in results[:1])
    return Grid(("", *titles), lines, notes)


def _held_out_cell(e: Entry | None) -> str:
    """Format mean ± standard error, and how many runs it leaves out."""
    if e is None:
        return "not run"
    mean = e.mean("test")
    if mean is None:
        return "diverged"
    error = f" ± {mean.deviation / mean.n**0.5:.2g}" if mean.n > 1 else ""
    lost = f" ({_share(e.diverged(1.0))} diverged)" if e.diverged(1.0)[0] else ""
    return f"{mean.mean:.4g}{error}{lost}"


def _how_held_out(found: Mapping[str, Mapping[str, Entry]]) -> str:
    """Say how much was searched, and how many seeds there are."""
    told = [
        there[who] for there in found.values() for who in ON_HELD_OUT if who in there
    ]
    trials = sorted({len(e.trials) for e in told if e.record["searched"]})
    seeds = sorted({len(e.runs()) for e in told if e.runs()})
    return (
        f"{' or '.join(map(str, trials)) or 'No'} trials of random search for each "
        f"but the recipe, on another seed; {' or '.join(map(str, seeds)) or 'no'} "
        "seeds."
    )


def _by_task(
    results: Sequence[Result],
) -> tuple[dict[str, dict[str, Entry]], dict[str, str]]:
    """Return the contestants of each task, and the titles of all."""
    columns = {r["name"]: {e.name: e for e in entries(r)} for r in results}
    return columns, {n: e.title for found in columns.values() for n, e in found.items()}


def _matrix(
    results: Sequence[Result], measure: Callable[[Entry], Mean | None], note: str
) -> Grid:
    """Arrange one measure by contestant and task."""
    columns, titles = _by_task(results)
    cells: dict[str, dict[str, str]] = {name: {} for name in titles}
    for column, found in columns.items():
        means = {name: measure(e) for name, e in found.items()}
        best = lowest(means)
        for name in titles:
            text = _mean(means[name]) if name in means else "–"
            cells[name][column] = f"**{text}**" if name == best else text
    lines = [(titles[name], *cells[name].values()) for name in titles]
    notes = [note, *(where(r["environment"]) for r in results[:1])]
    return Grid(("", *columns), lines, notes)


def time_to_adamw(results: Sequence[Result]) -> Grid:
    """Tell how soon every contestant is as good as AdamW at its best."""
    columns, titles = _by_task(results)
    lines = [
        (title, *(_relative(found, name) for found in columns.values()))
        for name, title in titles.items()
    ]
    note = (
        "Steps (seconds) until AdamW's best test loss, as a share of the steps "
        "(seconds) that AdamW itself takes. –: not reached by the end, or not tried."
    )
    return Grid(("", *columns), lines, [note])


def _relative(found: Mapping[str, Entry], name: str) -> str:
    """Format steps and seconds to AdamW's best, in units of AdamW's."""
    if UNIT not in found or name not in found:
        return "–"
    target = found[UNIT].best()
    unit, steps = found[UNIT].steps_to(target), found[name].steps_to(target)
    if math.isinf(steps) or math.isinf(unit) or not unit:
        return "–"
    seconds, unit_seconds = found[name].seconds_at(steps), found[UNIT].seconds_at(unit)
    if not seconds or not unit_seconds:
        return f"{steps / unit:.2f}"
    return f"{steps / unit:.2f} ({seconds / unit_seconds:.2f})"


def factors(results: Sequence[Result]) -> Grid:
    """Tell how fixed settings bear other learning rates, and how often they diverge."""
    found = [
        (r["name"], e) for r in results for e in entries(r) if not e.record["searched"]
    ]
    tried = sorted({factor for _, e in found for factor in e.factors()})
    header = ("settings without search", *(f"lr × {f:g}" for f in tried), "diverged")
    lines = [
        (
            f"{e.title}: {name}",
            *(
                _mean(e.mean("test", f)) if f in e.factors() else "–"  # not tried
                for f in tried
            ),
            _share(e.diverged()),
        )
        for name, e in found
    ]
    return Grid(
        header, lines, ["Test losses; means over the runs that did not diverge."]
    )


def batch_sizes(results: Sequence[Result]) -> Grid:
    """Tell how a fixed rule for the learning rate bears other batch sizes."""
    found = [(r, e) for r in results for e in entries(r) if not e.record["searched"]]
    tried = sorted({factor for _, e in found for factor in e.factors()})
    lines = []
    for r, e in found:
        means = {f: e.mean("test", f) for f in e.factors()}
        best = lowest(means)
        cells = {f: _mean(mean) for f, mean in means.items()}
        for f in means:
            if e.diverged(f)[0]:
                cells[f] += f" ({_share(e.diverged(f))} diverged)"
        if best is not None:
            cells[best] = f"**{cells[best]}**"
        lines.append(
            (r["title"], str(r["batch_size"]), *(cells.get(f, "–") for f in tried))
        )
    header = ("task", "batch size", *(f"lr × {f:g}" for f in tried))
    notes = [
        "Test losses, the lowest of each line in bold; means over the runs that did "
        "not diverge. Equal numbers of steps for all batch sizes.",
        *(where(r["environment"]) for r in results[:1]),
    ]
    return Grid(header, lines, notes)


def spaces(results: Sequence[Result]) -> Grid:
    """Tell what was searched."""
    found = {e["title"]: e for r in results for e in r["entries"]}
    lines = [
        (
            title,
            e["builder"],
            "; ".join(f"`{key}` {value}" for key, value in e["space"].items()) or "–",
        )
        for title, e in found.items()
    ]
    return Grid(("contestant", "built by", "settings"), lines, [])
