"""Writes the measured tables into the texts: `python -m benchmarks.report`."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import costs, front, networks, results, tables
from benchmarks.environment import ROOT
from benchmarks.gpu import tables as visits
from benchmarks.training import pictures
from benchmarks.training import tables as training
from benchmarks.training.tasks import HELD_OUT, MADE_ON, TASKS
from benchmarks.workloads import WORKLOADS

Table = Callable[[Path, str | None], str]
"""Draws a table, as Markdown, from the folder of results and a marker's second word."""


def of_file(draw: Callable[[Any], Any], name: str = "gpt256") -> Table:
    """Draw from one file; the second word names another."""
    return lambda folder, other: draw(
        results.load(folder / f"{other or name}.json")
    ).markdown()


def of_tasks(draw: Callable[[Any], Any], name: str = "train") -> Table:
    """Draw from all training tasks but the held-out ones; the word names a folder."""
    return lambda folder, other: draw(trained(folder / (other or name))).markdown()


def of_whole(draw: Callable[[Path], Any]) -> Table:
    """Draw from several files, which may not be there."""
    return lambda folder, _: draw(folder).markdown()


TABLES: dict[str, Table] = {
    "step": of_file(tables.step),
    "targets": of_file(tables.targets),
    "official": of_file(tables.official),
    "work": of_file(tables.work),
    "machine": of_file(tables.machine),
    "scaling": of_file(tables.scaling, "scaling"),
    "conformance": of_file(tables.conformance, "conformance"),
    "soak": of_file(tables.soak, "soak"),
    "ranks": of_file(tables.ranks, "scale"),
    "scale": of_file(tables.scale, "scale"),
    "costs": of_file(costs.table, "costs"),
    "operations": of_file(costs.operations, "costs"),
    "networks": of_file(networks.table, "networks"),
    "tasks": of_tasks(training.Sections),
    "test_losses": of_tasks(training.all_tasks),
    "training_losses": of_tasks(training.all_training),
    "time_to_adamw": of_tasks(training.time_to_adamw),
    "factors": of_tasks(training.factors),
    "spaces": of_tasks(training.spaces),
    "batch_sizes": of_tasks(training.batch_sizes, "batch"),
    "train_held_out": of_whole(
        lambda f: training.held_out(loaded(f / "train", HELD_OUT))
    ),
    "workloads": of_whole(lambda f: tables.workloads(loaded(f, WORKLOADS))),
    "front": of_whole(lambda f: front.table(trained(f / "train"), f / "gpu")),
    "gpu": lambda folder, _: visits.gpu_table(folder / "gpu"),
    "gpu_details": lambda folder, _: visits.gpu_details(folder / "gpu"),
}
"""What may stand in a marker: `<!-- table: step -->` … `<!-- end -->`."""

MARKER = re.compile(
    r"(?P<open><!-- table: (?P<table>\w+)(?: (?P<name>[\w./-]+))? -->\n)"
    r".*?(?P<close><!-- end -->)",
    re.DOTALL,
)
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


def render(text: str, folder: Path) -> tuple[str, int]:
    """Fill every marked place of a text; return the new one, and how many there are.

    Raises:
        ValueError: If a marker names a table that does not exist.
        FileNotFoundError: If a marker names a result that does not exist.
    """

    def fill(match: re.Match[str]) -> str:
        if match["table"] not in TABLES:
            raise ValueError(
                f"The text asks for table {match['table']!r}; "
                f"there are {', '.join(TABLES)}."
            )
        told = TABLES[match["table"]](folder, match["name"])
        return f"{match['open']}{told}\n{match['close']}"

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


def loaded(folder: Path, names: Iterable[str]) -> list[dict[str, Any]]:
    """Load the results on some tasks or workloads, as far as they are there."""
    paths = [folder / f"{name}.json" for name in names]
    return [results.load(path) for path in paths if path.exists()]


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
    drawn = [
        (path, pictures.draw, path.with_suffix(".png"))
        for path in sorted(folder.glob("train/*.json"))
        if path.stem not in HELD_OUT  # which stand in one table
    ]
    main_task = folder / "train" / f"{front.PICTURE_TASK}.json"
    if main_task.exists():
        drawn.append((main_task, front.picture, folder / "front.png"))
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
