"""The options of the command."""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import environment, results
from benchmarks.training.spaces import CONTESTANTS, ON_HELD_OUT
from benchmarks.training.tasks import HELD_OUT, QUICK, TASKS

RESULTS = results.RESULTS / "train"
STORE = environment.ROOT / "build" / "train"
QUICK_RESULTS = STORE / "quick"
FACTORS = (0.5, 1.0, 2.0)
TRIALS, SEEDS, ROUNDS = 10, 3, 2
QUICK_TRIALS, HELD_OUT_TRIALS = 3, 12


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
        help=f"what to train on: all that the recipe was made on (default), or "
        f"{', '.join(TASKS)}",
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
        help="on the learning rate, for contestants without search; 1 is always "
        "among them; default: ½, 1, 2",
    )
    add(
        "--rounds",
        type=int,
        help=f"of timing, 0 for none; default: {ROUNDS}",
    )
    add(
        "--quick",
        action="store_true",
        help=f"{QUICK_TRIALS} trials on {', '.join(QUICK)}; results go to "
        f"{QUICK_RESULTS.relative_to(environment.ROOT)}",
    )
    add(
        "--held-out",
        action="store_true",
        help=f"the tasks that the recipe was not made on, {', '.join(ON_HELD_OUT)} on "
        f"them, {HELD_OUT_TRIALS} trials, one learning rate without search, no timing; "
        "all searches come before the winners' runs, which keeps many processes busy",
    )
    add(
        *("--jobs", "--workers"),
        type=positive,
        default=environment.cores(),
        help="how many processes train at once, default: cores",
    )
    add("--fresh", action="store_true", help="run again what is finished")
    add("--list", action="store_true", help="list who would be trained, then stop")
    add("--results", type=Path, help="folder of the JSON files")
    add("--store", type=Path, default=STORE, help="folder of finished runs")
    args = parser.parse_args(argv)
    _fill_in(args)
    if args.rounds < 0:
        parser.error("--rounds must be at least 0.")
    if not all(math.isfinite(f) and f > 0 for f in args.lr_factors):
        parser.error("--lr-factors must be positive numbers.")
    args.lr_factors = sorted({1.0, *args.lr_factors})
    return args


def _fill_in(args: argparse.Namespace) -> None:
    """Set what was not given."""
    unasked: dict[str, Any] = {
        "task": ["all"],
        "contestant": ["main"],
        "trials": TRIALS,
        "rounds": ROUNDS,
        "lr_factors": FACTORS,
        "results": RESULTS,
    }
    if args.quick:
        unasked |= {"task": QUICK, "trials": QUICK_TRIALS, "results": QUICK_RESULTS}
    if args.held_out:
        unasked |= {"task": HELD_OUT, "contestant": ON_HELD_OUT, "rounds": 0}
        unasked |= {"trials": HELD_OUT_TRIALS, "lr_factors": (1.0,)}
    for name, value in unasked.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
