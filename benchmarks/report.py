"""Writes the measured tables into the texts: `python -m benchmarks.report`."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks import costs, front, networks, results, tables
from benchmarks.environment import ROOT
from benchmarks.gpu import tables as visits
from benchmarks.training import pictures
from benchmarks.training import tables as training
from benchmarks.training.tasks import HELD_OUT, MADE_ON, TASKS
from benchmarks.workloads import WORKLOADS


class Markdown(Protocol):
    """What can be written into a text."""

    def markdown(self) -> str:
        """Return it in Markdown."""
        ...


TABLES: dict[str, Callable[[dict[str, Any]], tables.Grid]] = {
    "step": tables.step,
    "targets": tables.targets,
    "official": tables.official,
    "work": tables.work,
    "scaling": tables.scaling,
    "machine": tables.machine,
    "conformance": tables.conformance,
    "soak": tables.soak,
    "ranks": tables.ranks,
    "scale": tables.scale,
    "training": training.task,
    "costs": costs.table,
    "networks": networks.table,
    "operations": costs.operations,
}
"""What may stand in a marker: `<!-- table: step -->` … `<!-- end -->`.

A second word names another result file: `<!-- table: step mlp100 -->`.
"""

OVERVIEWS: dict[str, Callable[[Sequence[dict[str, Any]]], Markdown]] = {
    "tasks": training.Sections,
    "test_losses": training.all_tasks,
    "training_losses": training.all_training,
    "time_to_adamw": training.time_to_adamw,
    "factors": training.factors,
    "spaces": training.spaces,
    "batch_sizes": training.batch_sizes,
}
"""Tables of all training tasks but the held-out ones, which `train_held_out` has.

A second word names another folder than `train`.
"""

VISITS: dict[str, Callable[[Path], str]] = {
    "gpu": visits.gpu_table,
    "gpu_details": visits.gpu_details,
}
"""What a visit to a GPU has found, or that there was none."""

SPECIAL = ("front", "workloads", "train_held_out")
"""Tables that are drawn from several files, which may not be there."""

MARKER = re.compile(
    r"(?P<open><!-- table: (?P<table>\w+)(?: (?P<name>[\w./-]+))? -->\n)"
    r".*?(?P<close><!-- end -->)",
    re.DOTALL,
)
DEFAULT_NAME = "gpt256"
TEXTS = tuple(
    ROOT / name
    for name in (
        "README.md",
        "benchmarks/SPEED.md",
        "benchmarks/TRAINING.md",
        "docs/compatibility.md",
        "docs/costs.md",
        "docs/differences.md",
        "docs/from_adamw.md",
        "docs/many_devices.md",
    )
)
OWN_NAMES = ("conformance", "costs", "networks", "scaling", "scale")
"""Tables whose results stand in a file of their own name."""


def result_name(match: re.Match[str]) -> str:
    """Return the name of the result file that a marker asks for."""
    own = match["table"] if match["table"] in OWN_NAMES else DEFAULT_NAME
    return match["name"] or own


def render(text: str, folder: Path) -> tuple[str, int]:
    """Fill every marked place of a text with its table.

    Args:
        text: Markdown with markers.
        folder: Where the result files are.

    Returns:
        The new text, and how many places it has.

    Raises:
        ValueError: If a marker names a table that does not exist.
        FileNotFoundError: If a marker names a result that does not exist.
    """

    def fill(match: re.Match[str]) -> str:
        grid: Markdown
        if match["table"] in VISITS:  # there may be none
            told = VISITS[match["table"]](folder / "gpu")
            return f"{match['open']}{told}\n{match['close']}"
        if match["table"] == "front":
            grid = front.table(trained(folder / "train"), folder / "gpu")
        elif match["table"] == "workloads":
            grid = tables.workloads(stepped(folder))
        elif match["table"] == "train_held_out":  # there may be none
            found = loaded(folder / (match["name"] or "train"), HELD_OUT)
            grid = training.held_out(found)
        elif match["table"] in OVERVIEWS:
            kind = "batch" if match["table"] == "batch_sizes" else "train"
            found = trained(folder / (match["name"] or kind))
            grid = OVERVIEWS[match["table"]](found)
        elif match["table"] in TABLES:
            path = folder / f"{result_name(match)}.json"
            grid = TABLES[match["table"]](results.load(path))
        else:
            raise ValueError(
                f"The text asks for table {match['table']!r}; "
                f"there are {', '.join([*TABLES, *SPECIAL, *VISITS, *OVERVIEWS])}."
            )
        return f"{match['open']}{grid.markdown()}\n{match['close']}"

    return MARKER.subn(fill, text)


def trained(folder: Path) -> list[dict[str, Any]]:
    """Load the training results of a folder, in the order of the tasks.

    Raises:
        FileNotFoundError: If there are none.
    """
    paths = {path.stem: path for path in folder.glob("*.json")}
    if not paths:
        raise FileNotFoundError(f"{folder} has no results.")
    if any(name in paths for name in TASKS):
        # Runs of another length or batch size have names of their own, and no column.
        return loaded(folder, MADE_ON)
    order = {task.title: i for i, task in enumerate(TASKS.values())}
    resized = [results.load(path) for path in paths.values()]
    return sorted(resized, key=lambda r: (order[r["title"]], r["batch_size"]))


def loaded(folder: Path, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Load the training results on some tasks, as far as they are there."""
    paths = [folder / f"{task}.json" for task in tasks]
    return [results.load(path) for path in paths if path.exists()]


def stepped(folder: Path) -> list[dict[str, Any]]:
    """Load the timed workloads of a folder, in the order of their list."""
    paths = {name: folder / f"{name}.json" for name in WORKLOADS}
    return [results.load(path) for path in paths.values() if path.exists()]


def picture(result: dict[str, Any], path: Path) -> None:
    """Draw the ratios to AdamW as horizontal bars, with quartiles."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [row for row in results.rows(result) if row.ms and not row.error]
    ratios = [row.ratio() for row in measured]
    names = [
        ("official: " if row.package == "official" else "") + tables.configuration(row)
        for row in measured
    ]
    colors = {"torch": "tab:gray", "ours": "tab:blue", "official": "tab:orange"}
    middle = [r.median for r in ratios]
    errors = [
        [r.median - r.low for r in ratios],
        [r.high - r.median for r in ratios],
    ]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.3 * len(names)))
    bars = axes.barh(
        names,
        middle,
        xerr=errors,
        color=[colors.get(row.package, "tab:green") for row in measured],
        error_kw={"elinewidth": 1, "capsize": 2},
    )
    axes.bar_label(bars, labels=[f"{m:.3g}" for m in middle], padding=4)
    axes.set_xscale("log")
    axes.set_xlim(0.7 * min(middle), 2 * max(middle))
    axes.set_xlabel("time of one step, in AdamW(foreach=True) steps of the same round")
    axes.set_title(f"{result['workload']}, {result['environment']['cpu']}")
    axes.invert_yaxis()
    figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the texts, or with `--check` say whether that would change them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description=main.__doc__
    )
    add = parser.add_argument
    add("--check", action="store_true", help="change nothing; 1 if something would")
    add("--readme", type=Path, nargs="+", default=TEXTS, help="the texts to fill")
    add("--results", type=Path, default=results.RESULTS, help="folder of JSON files")
    args = parser.parse_args(argv)
    problems = [fill(path, args.results, args.check) for path in args.readme]
    if any(problems) or args.check:
        return int(any(problems))
    for name in draw(args.results):
        print(f"Drew {name}.")
    return 0


def draw(folder: Path, *, missing: bool = False) -> Iterator[str]:
    """Draw the pictures of a folder of results; yield the names of what is drawn.

    Args:
        folder: Where the result files are.
        missing: Whether to draw only what is not there.
    """
    drawn: list[tuple[Path, Callable[[Any, Path], None], Path]] = [
        (path, picture, path.with_suffix(".png"))
        for path in sorted(folder.glob("*.json"))
        if "contestants" in results.load(path)
    ]
    main_task = folder / "train" / f"{front.PICTURE_TASK}.json"
    if main_task.exists():
        drawn.append((main_task, front.picture, folder / "front.png"))
    drawn += [
        (path, pictures.draw, path.with_suffix(".png"))
        for path in sorted(folder.glob("train/*.json"))
    ]
    for source, how, target in drawn:
        if not (missing and target.exists()):
            how(results.load(source), target)
            yield str(target.relative_to(folder))


def fill(text: Path, folder: Path, check: bool) -> bool:
    """Rewrite one text, unless it is only checked; return whether that is a problem."""
    old = text.read_text(encoding="utf-8")
    try:
        new, places = render(old, folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"{text.name}: {error}")
        return True
    if not places:
        print(f"{text.name} has no marker such as <!-- table: step -->.")
        return True
    if check:
        print(f"{text.name} {'agrees with' if new == old else 'is not'} results")
        return new != old
    text.write_text(new, encoding="utf-8")
    print(f"{text.name}: {places} tables, {'changed' if new != old else 'same'}.")
    return False


if __name__ == "__main__":
    sys.exit(main())
