"""One training run, from its description to its record."""

import json
import math
import random
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.optimizers import build, edition
from benchmarks.training.data import Part
from benchmarks.training.task import accuracy
from benchmarks.training.tasks import TASKS

POINTS = 20  # of a curve, beside its start
EXPLODED = 100.0  # times the first loss: nothing comes back from there
SEARCH_SEED = 0  # of all trials; the winners' runs have 1, 2, …
DIGITS = 5  # of a number in a record

Spec = Mapping[str, Any]
SPEC = ("task", "steps", "batch_size", "builder", "settings", "lr_factor", "seed")
"""What a run is described by: all that its result depends on, but versions."""


def spec_of(
    task: str,
    builder: str,
    settings: Mapping[str, Any],
    *,
    seed: int,
    steps: int | None = None,
    batch_size: int | None = None,
    lr_factor: float = 1.0,
) -> dict[str, Any]:
    """Describe a run; steps and batch size are the task's if not given."""
    values = (
        task,
        steps or TASKS[task].steps,
        batch_size or TASKS[task].batch_size,
        builder,
        dict(settings),
        lr_factor,
        seed,
    )
    return dict(zip(SPEC, values, strict=True))


def key_of(spec: Spec) -> str:
    """Name a run: equal descriptions have equal names."""
    return json.dumps(spec, sort_keys=True)


def warmup_cosine(
    step: int, steps: int, *, warms: bool = True, falls: bool = True
) -> float:
    """Return the factor on the learning rate: a tenth up linearly, the rest a cosine.

    Unless it `warms`, it starts at its height; unless it `falls`, it stays there.
    """
    warmup = max(1, steps // 10) if warms else 0
    if step < warmup:
        return (step + 1) / warmup
    if not falls:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def points(steps: int) -> list[int]:
    """Return the steps before which a curve is looked at, and the end."""
    return sorted({round(i * steps / POINTS) for i in range(POINTS + 1)})


class Training:
    """A network amid training.

    Attributes:
        done: How many steps it took.
    """

    def __init__(self, spec: Spec) -> None:
        """Make network, batches and optimizers: the first two follow from the seed."""
        self.task, self.steps = TASKS[spec["task"]], spec["steps"]
        self.data = self.task.load()
        self.batch_size = spec["batch_size"]
        torch.manual_seed(spec["seed"])
        random.seed(spec["seed"])  # which some optimizers draw from
        self.model = self.task.model(self.data)
        self._batches = torch.Generator().manual_seed(spec["seed"])
        settings = dict(spec["settings"])
        self._factor = partial(warmup_cosine, **settings.pop("schedule", {}))
        self.optimizers = build(spec["builder"], self.model, settings, spec)
        self._lr = [
            (group, float(group["lr"]) * spec["lr_factor"])
            for optimizer in self.optimizers
            for group in optimizer.param_groups
        ]
        self.done = 0

    def step(self) -> Tensor:
        """Take a step; return the loss of its batch."""
        part = self.data.train
        rows = torch.randint(len(part), (self.batch_size,), generator=self._batches)
        batch = part.rows(rows)
        factor = self._factor(self.done, self.steps)
        for group, lr in self._lr:
            group["lr"] = lr * factor
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss = self.task.batch_loss(self.model, batch)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        self.done += 1
        return loss.detach()

    @torch.no_grad()
    def score(self, part: Part) -> tuple[float, float]:
        """Return loss and accuracy (percent) on some examples."""
        self.model.eval()
        outputs = self.model(part.inputs)
        loss = self.task.loss(part.inputs, outputs, part.targets).item()
        hits = math.nan
        if self.task.has_classes:
            hits = accuracy(outputs, part.targets)
        self.model.train()
        return loss, hits


def run(
    spec: Spec, curve: bool, after_step: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Train; tell losses on all parts of the data.

    A run has diverged if a loss is not finite, if a batch's loss exceeds the first
    one's `EXPLODED` times, if the optimizer's own decomposition fails, or if the
    validation loss ends above that of the untrained network. For a curve, the test loss
    is looked at along the way. The record is `spec` and what was found.
    """
    training = Training(spec)
    data, steps = training.data, training.steps
    start = time.perf_counter()
    untrained, _ = training.score(data.val)
    looked = points(steps) if curve else []
    losses: dict[int, float] = {}
    first, why = math.nan, None
    for step in range(steps):
        if step in looked:
            losses[step], _ = training.score(data.test)
        try:
            loss = training.step().item()
        except torch.linalg.LinAlgError as error:
            why = f"step {step}: {str(error).splitlines()[0]}"
            break
        after_step()
        first = loss if step == 0 else first
        if not loss <= EXPLODED * first:  # nor is NaN
            why = f"step {step}: the batch's loss is {loss:.3g}"
            break
    found = _scores(training) if why is None else {}
    if found and not found["val"] <= untrained:
        why = f"ended at {found['val']:.3g}, began at {untrained:.3g}"
    if found and curve:
        losses[steps] = found["test"]
    return {
        **spec,
        "diverged": why,
        "untrained": _short(untrained),
        **{key: _short(x) for key, x in found.items()},
        "curve": {str(step): _short(x) for step, x in losses.items()},
        "seconds": round(time.perf_counter() - start, 2),
        "code": edition(spec["builder"]),
        "data": data.hash,
    }


def _scores(training: Training) -> dict[str, float]:
    """Return the losses on all parts, and the accuracy on the test part."""
    data = training.data
    few = torch.linspace(0, len(data.train) - 1, min(len(data.train), 1200)).long()
    if training.task.has_classes and data.train.targets.ndim > 1:
        # a window of text holds many characters
        few = few[:: len(few) // 256]
    train, _ = training.score(data.train.rows(few))
    val, _ = training.score(data.val)
    test, hits = training.score(data.test)
    return {"train": train, "val": val, "test": test, "accuracy": hits}


def _short(number: float) -> float | None:
    """Round to what a record keeps; JSON knows no NaN."""
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None
