"""The command of the visit: `python -m benchmarks.gpu --help`."""

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from time import monotonic

import torch

from benchmarks.environment import ROOT
from benchmarks.gpu import driver, tables
from benchmarks.gpu.visit import RESULTS, Visit, surroundings

REHEARSAL = ROOT / "out" / "gpu"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Test, measure and train on a GPU within one short visit. Writes "
        "a JSON file a stage, as it goes, and prints a table at the end.",
    )
    add = parser.add_argument
    add("--device", choices=["cuda", "cpu"], default="cuda", help="default: cuda")
    add("--tiny", action="store_true", help="all is small: to rehearse")
    add("--budget", type=float, default=480, help="seconds, default: %(default)s")
    add(
        "--stage",
        nargs="+",
        choices=list(driver.SHARES),
        default=list(driver.SHARES),
        help="default: all",
    )
    add(
        "--out",
        type=Path,
        help="folder of the results; default: that of the committed ones, or out/gpu "
        "for a rehearsal, which is no result",
    )
    add("--run", choices=list(driver.SHARES), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU. To rehearse: --device cpu --tiny")
    rehearses = args.tiny or args.device == "cpu"
    args.out = (args.out or (REHEARSAL if rehearses else RESULTS)).resolve()
    args.stage = [name for name in driver.SHARES if name in args.stage]
    return args


def run(stage: str, args: argparse.Namespace) -> int:
    """Run one stage in this process."""
    end = monotonic() + args.budget
    visit = Visit(stage, args.device, args.tiny, args.out, end)
    if args.tiny:
        torch.set_num_threads(1)
    visit.save(
        stage=stage,
        status="running",
        tiny=args.tiny,
        budget=args.budget,
        environment=surroundings(args.device),
    )
    try:
        import_module(f"benchmarks.gpu.{stage}").run(visit)
    except Exception as error:  # told in the file, which tables read
        traceback.print_exc()
        visit.save(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
        return 1
    visit.save(status="ok")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return 1 if one failed or was cut."""
    args = parse(argv)
    if args.run:
        return run(args.run, args)
    command = ["--device", args.device, "--out", str(args.out)]
    command += ["--tiny"] if args.tiny else []
    outcomes = driver.run_stages(args.stage, args.budget, command, args.out)
    print(tables.screen(args.out))
    return int(any(status != "ok" for status in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
