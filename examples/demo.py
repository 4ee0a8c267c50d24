"""Train two small networks with SGD, AdamW and SIRFShampoo on equal terms.

Digits:  a small CNN on the 8 x 8 handwritten digits that scikit-learn ships.
Text:    a small character-level transformer on the help texts that Python ships.

Every contestant starts from the same weights and sees the same batches in the same
order. Run `make demo`, or `python examples/demo.py --help`.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from pydoc_data import topics
from statistics import fmean

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

try:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits

    from sirfshampoo import SIRFShampoo, recipe
except ModuleNotFoundError as missing:
    sys.exit(
        f"The demo needs the module {missing.name!r}. Run `make demo`, which installs "
        "everything, or `pip install -e '.[demo]'` in the root of the repository."
    )

# ------------------------------------------------------------------ contestants

Setup = Callable[[nn.Module], Optimizer]
"""How a contestant prepares for a network: from the network to its optimizer."""


# How the settings were found: SGD and AdamW got ten trials on each task, five learning
# rates times two values of a second setting (momentum for SGD, beta2 for AdamW), judged
# by the validation loss after the last step with seed 1 (for digits: the mean over
# seeds 1, 2 and 3). The demo itself takes others. SIRFShampoo was not searched: it
# takes what `recipe` says.


def sgd(model: nn.Module, lr: float, momentum: float) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)


def adamw(model: nn.Module, lr: float, beta2: float) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, beta2))


def sirf(
    model: nn.Module, *, batch_size: int, steps: int, dtype: torch.dtype | None = None
) -> Optimizer:
    arguments = recipe(model, batch_size=batch_size, steps=steps)
    return SIRFShampoo(model, preconditioner_dtypes=dtype, **arguments)


# ------------------------------------------------------------------------ tasks

Batch = tuple[Tensor, Tensor]


@dataclass
class Task:
    """A data set, a network for it, and the settings each contestant brings."""

    name: str
    batch_size: int
    steps: int
    repeats: int  # with other seeds; reported are the means
    train: Batch  # inputs [N, ...], targets [N, ...]
    val: Batch
    make_model: Callable[[], nn.Module]
    contestants: dict[str, Setup]


class Block(nn.Module):
    """One pre-norm transformer layer: causal attention, then a two-layer network."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, heads, t, w/h]
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character at every position."""

    def __init__(self, vocab: int, context: int, width: int = 64, layers: int = 2):
        super().__init__()
        self.token = nn.Embedding(vocab, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocab]
        x = self.token(text) + self.position.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 8 x 8 -> 4 x 4
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),  # 4 x 4 -> 2 x 2
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits_task() -> Task:
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(raw.target)
    # The writers come one after the other: an unshuffled tail would be new writers.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, val = order[:1437], order[1437:]
    return Task(
        name="digits",
        batch_size=64,
        steps=200,
        repeats=3,  # 360 images to validate on: a single run is too noisy to compare
        train=(images[train], labels[train]),
        val=(images[val], labels[val]),
        make_model=make_cnn,
        contestants={
            # tried: lr 1e-2, 3e-2, 1e-1, 2e-1, 3e-1; momentum 0.9, 0.95
            "SGD": partial(sgd, lr=3e-2, momentum=0.95),
            # tried: lr 1e-3, 3e-3, 6e-3, 1e-2, 2e-2; beta2 0.99, 0.999
            "AdamW": partial(adamw, lr=2e-2, beta2=0.999),
            "SIRFShampoo": partial(sirf, batch_size=64, steps=200),
            "SIRFShampoo bf16": partial(
                sirf, batch_size=64, steps=200, dtype=torch.bfloat16
            ),
        },
    )


def text_task(context: int = 64) -> Task:
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    vocab = sorted(set(text))
    index = {char: i for i, char in enumerate(vocab)}
    stream = torch.tensor([index[char] for char in text])
    # All windows of `context` characters, each with the one that follows it as target.
    windows = stream.unfold(0, context + 1, 1)  # a view: [len - context, context + 1]
    cut = int(0.9 * len(windows))
    train, val = windows[:cut], windows[cut + context :: 2 * context]
    return Task(
        name="text",
        batch_size=32,
        steps=400,
        repeats=1,
        train=(train[:, :-1], train[:, 1:]),
        val=(val[:, :-1], val[:, 1:]),
        make_model=partial(Transformer, len(vocab), context),
        contestants={
            # tried: lr 3e-2, 5e-2, 1e-1, 2e-1, 3e-1; momentum 0.9, 0.95
            "SGD": partial(sgd, lr=1e-1, momentum=0.9),
            # tried: lr 1e-3, 3e-3, 6e-3, 1e-2, 2e-2; beta2 0.99, 0.999
            "AdamW": partial(adamw, lr=6e-3, beta2=0.99),
            "SIRFShampoo": partial(sirf, batch_size=32, steps=400),
            "SIRFShampoo bf16": partial(
                sirf, batch_size=32, steps=400, dtype=torch.bfloat16
            ),
        },
    )


# --------------------------------------------------------------------- training


@dataclass
class Run:
    """What one contestant showed on one task."""

    task: str
    name: str
    # The loss curve: steps, seconds of training until then, validation loss.
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    # What stands in the table, after the last step.
    train_loss: float = math.nan
    val_loss: float = math.nan
    accuracy: float = math.nan  # on the validation data, in percent
    ms: float = math.nan  # mean of a step: forward, backward, update
    state_bytes: int = 0


def warmup_cosine(step: int, *, steps: int) -> float:
    """The factor on the learning rate: up linearly for 10 %, then down a cosine."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def score(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy and the fraction of correct predictions."""
    inputs, targets = batch
    logits = model(inputs)
    hits = (logits.argmax(-1) == targets).float().mean()
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten()), hits


@torch.no_grad()
def evaluate(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Return loss and accuracy on at most 400 examples, evenly spread."""
    model.eval()  # SIRFShampoo counts the examples of training mode only
    inputs, targets = data
    rows = torch.linspace(0, len(inputs) - 1, min(400, len(inputs))).long()
    loss, hits = score(model, (inputs[rows], targets[rows]))
    model.train()
    return loss.item(), hits.item()


def train(
    task: Task,
    contestant: str,
    *,
    steps: int,
    seed: int,
    after_step: Callable[[], None] = lambda: None,
) -> Run:
    """Train a fresh network with one contestant."""
    run = Run(task.name, contestant)
    torch.manual_seed(seed)  # the same weights for everyone ...
    batches = torch.Generator().manual_seed(seed)  # ... and the same batches
    model = task.make_model()
    optimizer = task.contestants[contestant](model)
    schedule = LambdaLR(optimizer, partial(warmup_cosine, steps=steps))
    inputs, targets = task.train
    times: list[float] = []

    def measure() -> None:
        run.steps.append(len(times))
        run.seconds.append(sum(times))
        run.val_loss, hits = evaluate(model, task.val)
        run.losses.append(run.val_loss)
        run.accuracy = 100 * hits

    for step in range(steps):
        if step % max(1, steps // 20) == 0:
            measure()
        rows = torch.randint(len(inputs), (task.batch_size,), generator=batches)
        batch = inputs[rows], targets[rows]
        start = time.perf_counter()
        optimizer.zero_grad()
        loss, _ = score(model, batch)
        loss.backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
        schedule.step()
        after_step()
    measure()

    run.train_loss, _ = evaluate(model, task.train)
    run.ms = 1e3 * fmean(times)
    run.state_bytes = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    )
    return run


def mean_of(runs: list[Run]) -> Run:
    """Return one run with the means of runs that differ in the seed alone."""
    return replace(
        runs[0],
        seconds=[fmean(at) for at in zip(*(run.seconds for run in runs), strict=True)],
        losses=[fmean(at) for at in zip(*(run.losses for run in runs), strict=True)],
        train_loss=fmean(run.train_loss for run in runs),
        val_loss=fmean(run.val_loss for run in runs),
        accuracy=fmean(run.accuracy for run in runs),
        ms=fmean(run.ms for run in runs),
    )


# ----------------------------------------------------------------------- report

MEASURES = {  # heading: (attribute of Run, format, whether more is better)
    "train loss": ("train_loss", "{:.4f}", False),
    "validation loss": ("val_loss", "{:.4f}", False),
    "accuracy %": ("accuracy", "{:.1f}", True),
    "ms per step": ("ms", "{:.1f}", False),
    "state bytes": ("state_bytes", "{:,}", False),
}
COLORS = {
    "SGD": "#8c8c8c",
    "AdamW": "#e08214",
    "SIRFShampoo": "#1f5fa8",
    "SIRFShampoo bf16": "#6fb1e4",
}


def closing_table(runs: list[Run]) -> Table:
    """One row a run; the best number of each task in bold."""
    table = Table(title="After the last step (bold: the best of the task)")
    table.add_column("task")
    table.add_column("optimizer")
    for heading in MEASURES:
        table.add_column(heading, justify="right")
    for task in dict.fromkeys(run.task for run in runs):
        rivals = [run for run in runs if run.task == task]
        for run in rivals:
            cells = []
            for attribute, form, more in MEASURES.values():
                values = [getattr(rival, attribute) for rival in rivals]
                best = getattr(run, attribute) == (max if more else min)(values)
                text = form.format(getattr(run, attribute))
                cells.append(f"[bold]{text}[/]" if best else text)
            table.add_row(task, run.name, *cells)
        table.add_section()
    return table


def verdicts(runs: list[Run]) -> list[str]:
    """Say for each run of SIRFShampoo where it leads the others and where it loses."""
    lines = []
    for run in runs:
        rivals = [
            rival
            for rival in runs
            if rival.task == run.task and not rival.name.startswith("SIRF")
        ]
        if not run.name.startswith("SIRF") or not rivals:
            continue
        leads: list[str] = []
        loses: list[str] = []
        for heading, (attribute, form, more) in MEASURES.items():
            key = attrgetter(attribute)
            best = (max if more else min)(rivals, key=key)
            own, other = key(run), key(best)
            text = f"{heading} ({form.format(own)}, {best.name} {form.format(other)})"
            if own != other:  # a NaN leads in nothing
                side = leads if (own > other if more else own < other) else loses
                side.append(text)
        lines.append(
            f"{run.task}: {run.name} leads in {', '.join(leads) or 'nothing'}; "
            f"it loses in {', '.join(loses) or 'nothing'}."
        )
    return lines


def draw(runs: list[Run], path: Path) -> None:
    """Write the validation loss of each task by step and by second of training."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure = Figure(figsize=(11, 3.6 * len(tasks) + 0.6), layout="constrained")
    grid = figure.subplots(len(tasks), 2, squeeze=False, sharey="row")
    for axes, task in zip(grid, tasks, strict=True):
        rivals = [run for run in runs if run.task == task]
        lowest = min(run.val_loss for run in rivals)
        for run in rivals:
            style = {"color": COLORS.get(run.name), "label": run.name, "lw": 2}
            axes[0].plot(run.steps, run.losses, **style)
            axes[1].plot(run.seconds, run.losses, **style)
        if rivals[0].losses[0] > 10 * lowest:
            axes[0].set_yscale("log")
        axes[0].set(title=f"{task}: by step", xlabel="steps")
        axes[1].set(title=f"{task}: by time", xlabel="seconds of training")
        axes[0].set_ylabel("validation loss")
        for ax in axes:
            ax.yaxis.set_major_formatter("{x:g}")
            ax.grid(which="both", alpha=0.25)
            ax.spines[["top", "right"]].set_visible(False)
            ax.set_xlim(left=0)
        axes[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


# ------------------------------------------------------------------------- main

TASKS = {"digits": digits_task, "text": text_task}


def positive(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number >= 1, got {text!r}")
    return int(text)


def picture(text: str) -> Path:
    """Read the path of a picture, and make its folder: complain before the work."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"needs a .png, .pdf or .svg, got {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot make the folder: {error}") from None
    return path


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=["all", *TASKS], default="all", help="default: all")
    add("--steps", type=positive, help="default: 200 for digits, 400 for text")
    add("--seed", type=int, default=10, help="of weights and batches; default: 10")
    add(
        "--output",
        type=picture,
        default="out/demo.png",
        help="where to draw the loss curves (.png, .pdf, .svg); default: out/demo.png",
    )
    add(
        "--threads",
        type=positive,
        default=1,
        help="of torch; the networks are too small to gain from many; default: 1",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train every contestant on the chosen tasks, then report."""
    args = read_arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width of its own
        console = Console(width=110)
    names = list(TASKS) if args.task == "all" else [args.task]
    tasks = [TASKS[name]() for name in names]

    runs = []
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        plan = [(task, args.steps or task.steps) for task in tasks]
        bar = progress.add_task(
            "",
            total=sum(
                len(task.contestants) * task.repeats * steps for task, steps in plan
            ),
        )
        for task, steps in plan:
            for name in task.contestants:
                progress.update(bar, description=f"{task.name}: {name}")
                run = mean_of(
                    [
                        train(
                            task,
                            name,
                            steps=steps,
                            seed=args.seed + repeat,
                            after_step=partial(progress.advance, bar),
                        )
                        for repeat in range(task.repeats)
                    ]
                )
                progress.console.print(
                    f"{task.name}: {name} reached validation loss {run.val_loss:.4f} "
                    f"in {steps} steps, {run.seconds[-1]:.1f} s"
                    + (f" (means of {task.repeats} runs)" if task.repeats > 1 else ""),
                    highlight=False,
                )
                runs.append(run)
        progress.update(bar, description="done")

    console.print(closing_table(runs))
    for line in verdicts(runs):
        console.print(line, highlight=False)
    draw(runs, args.output)
    console.print(f"Loss curves: {args.output}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
