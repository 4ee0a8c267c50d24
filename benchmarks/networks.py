"""Times steps on networks that people train first: `python -m benchmarks.networks`.

In one process, which the contestants take turns in: AdamW, Muon with AdamW, SOAP, and
the recipe, late in a run, where its factors are updated in every tenth step, and in the
first hundred steps of one.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks import environment, results, tables, worker
from benchmarks.contestants import BATCH_SIZE
from benchmarks.optimizers import build
from benchmarks.training.tasks import TASKS
from benchmarks.worker import GRADIENT_SETS, gradients
from sirfshampoo import recipe

Settings = dict[str, Any] | Callable[[nn.Module], dict[str, Any]]

Times = Mapping[str, Mapping[str, list[float]]]

LATE = 1000  # a step from which on the recipe's interval is 10
EARLY = range(100)
PERIODS = 3  # of ten steps that a turn late in a run has


def resnet20() -> nn.Module:
    """Return the ResNet of 20 layers for small images: 59 tensors, no shortcuts'."""
    layers: list[nn.Module] = []

    def add(channels: int, out: int) -> None:
        layers.extend([nn.Conv2d(channels, out, 3, bias=False), nn.BatchNorm2d(out)])

    add(3, 16)
    for channels, out in ((16, 16), (16, 32), (32, 64)):
        for block in range(3):
            add(channels if block == 0 else out, out)
            add(out, out)
    return nn.Sequential(*layers, nn.Linear(64, 10))


def of_task(name: str) -> Callable[[], nn.Module]:
    """Return what builds the network of a training task."""
    return lambda: TASKS[name].model(TASKS[name].load())


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "CNN, 8 tensors": of_task("digits-cnn"),
    "ResNet-20, 59 tensors": resnet20,
    "GPT, width 64, 30 tensors": of_task("transformer"),
    "GPT, width 128, 54 tensors": of_task("transformer-128"),
}
"""What is timed; a new network joins with one line."""


def of_recipe(
    settings: Mapping[str, Any], *, tensor_rate: bool = False
) -> Callable[[nn.Module], dict[str, Any]]:
    """Return what tells the recipe's arguments for a network that is never called.

    Args:
        settings: What is set otherwise.
        tensor_rate: Whether the learning rate is a tensor, as compiled steps want it.
    """

    def arguments(model: nn.Module) -> dict[str, Any]:
        told = recipe(model, batch_size=BATCH_SIZE, steps=5000)
        rate = {"lr": torch.tensor(told["lr"])} if tensor_rate else {}
        return {**told, **rate, "batch_size": BATCH_SIZE, **settings}

    return arguments


COMPILED = "recipe, compiled"
_LR = {"lr": 1e-3, "weight_decay": 0.01}
CONTESTANTS: Mapping[str, tuple[str, Settings]] = {
    "AdamW(foreach=True)": ("adamw", {**_LR, "beta2": 0.999, "foreach": True}),
    "Muon + AdamW": ("muon", {**_LR, "momentum": 0.95}),
    "SOAP, T = 10": ("soap", {**_LR, "beta2": 0.95, "precondition_frequency": 10}),
    "recipe": ("sirfshampoo", of_recipe({})),
    "recipe, bfloat16": (
        "sirfshampoo",
        of_recipe({"preconditioner_dtypes": "bfloat16"}),
    ),
    COMPILED: ("sirfshampoo", of_recipe({}, tensor_rate=True)),
}
"""Builder and settings of each."""


class Entry(worker.Entry):
    """One contestant on one network."""

    def __init__(
        self, model: nn.Module, builder: str, settings: Settings, *, compiles: bool
    ) -> None:
        model = deepcopy(model)
        arguments = settings(model) if callable(settings) else settings
        pool = [gradients(model, seed) for seed in range(GRADIENT_SETS)]
        super().__init__(model, build(builder, model, arguments), pool)
        self.first: Any = self.optimizers[0]
        if compiles:
            self.takes = [torch.compile(take) for take in self.takes]

    @property
    def has_early_steps(self) -> bool:
        """Whether steps at the start of a run cost more."""
        return hasattr(self.first, "global_step")

    def late(self, periods: int = PERIODS) -> list[float]:
        """Return the milliseconds of steps in whole periods, late in a run."""
        if self.has_early_steps:
            self.first.global_step = LATE
        return [self.step() for _ in range(10 * periods)]

    def early(self) -> list[float]:
        """Return the milliseconds of the first hundred steps."""
        self.first.global_step = 0
        return [self.step() for _ in EARLY]


def measure(
    name: str,
    contestants: Mapping[str, tuple[str, Settings]],
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, Any]:
    """Let contestants take turns on a network."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    entries = {
        key: Entry(model, *spec, compiles=key == COMPILED)
        for key, spec in contestants.items()
    }
    found: dict[str, dict[str, list[float]]] = {k: {} for k in entries}
    for entry in entries.values():  # warm-up, from the start of a run on
        for _ in range(40):
            entry.step()
        entry.late(1)

    def note(key: str, what: str, ms: Iterable[float]) -> None:
        found[key].setdefault(what, []).append(round(fmean(ms), 4))

    for number in range(rounds):
        # Back and forth: nobody always follows the same neighbour.
        order = list(entries.items())[:: 1 if number % 2 == 0 else -1]
        for key, entry in order:
            note(key, "late", entry.late())
            if entry.has_early_steps:
                note(key, "early", entry.early())
                entry.late(1)
        advance()
    numbers = sum(p.numel() for p in model.parameters())
    return {"network": name, "numbers": numbers, "ms": found}


def ratio(ms: Times, of: str, to: str, what: str = "late") -> str:
    """Tell how many of another contestant's late steps a step takes, by rounds."""
    pairs = zip(ms[of][what], ms[to]["late"], strict=True)
    return tables.spread(results.Spread.of([a / b for a, b in pairs]))


def table(result: dict[str, Any]) -> tables.Grid:
    """Return a line for each network and number of threads."""
    _, muon, soap, ours, *_ = CONTESTANTS
    timed = [k for k in CONTESTANTS if any(k in case["ms"] for case in result["cases"])]
    lines = []
    for case in result["cases"]:
        ms: Times = case["ms"]
        line = [f"{case['network']}; {case['threads']}"]
        line += [f"{median(ms[k]['late']):.2f}" if k in ms else "–" for k in timed]
        line += [ratio(ms, ours, muon), ratio(ms, ours, soap)]
        line.append(ratio(ms, ours, ours, "early"))
        lines.append(tuple(line))
    header = ("network; threads", *timed, f"recipe / {muon}", f"recipe / {soap}")
    notes = [
        f"{tables.where(result['environment'])} Milliseconds a step, medians over "
        f"{result['rounds']} rounds of means over {10 * PERIODS} steps late in a run. "
        "Last column: the mean of the first hundred steps, in late ones. Ratios are "
        "medians of those within a round (quartiles). Muon has the hidden matrices, "
        "AdamW all else: of the two networks of convolutions nearly all.",
    ]
    return tables.Grid((*header, "first 100 / late"), lines, notes)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.networks", description=__doc__
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (9)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", default="", help="part of a network's name")
    parser.add_argument(
        "--compiled", action="store_true", help="torch.compile(step), too: needs g++"
    )
    path = results.RESULTS / "networks.json"
    parser.add_argument("--out", type=Path, default=path, help=f"({path.name})")
    args = parser.parse_args(arguments)
    sys.path.append(str(environment.folder_of("pytorch-optimizer")))
    chosen = [name for name in NETWORKS if args.only in name]
    console = Console(stderr=True)
    cases = []
    with Progress(console=console) as progress:
        total = len(chosen) * len(args.threads) * args.rounds
        bar = progress.add_task("networks", total=total)
        for threads in args.threads:
            torch.set_num_threads(threads)
            for name in chosen:
                progress.update(bar, description=f"{name}, threads: {threads}")
                chosen_ones = {
                    key: spec
                    for key, spec in CONTESTANTS.items()
                    if args.compiled or key != COMPILED
                }
                advance = partial(progress.advance, bar)
                case = measure(name, chosen_ones, args.rounds, advance)
                cases.append({"threads": threads, **case})
    result = {
        "environment": environment.describe(max(args.threads)),
        "rounds": args.rounds,
        "cases": cases,
    }
    results.save(result, args.out)
    console.print(table(result).rich("Steps on networks that people train first"))
    console.print(f"Saved to {args.out}. Now `python -m benchmarks.report`.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
