"""Stage 4: a language model learns real text, with each optimizer in turn."""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu import text
from benchmarks.gpu.model import Language
from benchmarks.gpu.visit import Visit
from sirfshampoo import SIRFShampoo, recipe

WARM_UP = 0.1  # of the time
EVALUATIONS = 20  # of a run


@dataclass(frozen=True)
class Size:
    """How large everything is."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    context: int = 1024
    batch: int = 32  # sequences in a step
    validation: int = 32  # sequences
    guess: int = 400  # steps of a run, until one has told

    def build(self, vocabulary: int) -> Language:
        """Return the model, always the same."""
        torch.manual_seed(0)
        return Language(vocabulary, self.context, self.layers, self.width, self.heads)


TINY = Size(layers=2, width=32, heads=2, context=32, batch=2, validation=2, guess=20)


def adamw(params: Any, lr: float = 1e-3) -> torch.optim.Optimizer:
    """Return AdamW as language models are trained with it."""
    return torch.optim.AdamW(
        params, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def muon(model: Language, steps: int, batch: int) -> list[Any]:
    """Give the hidden matrices to Muon, the embedding and the head to AdamW."""
    hidden = list(model.blocks.parameters())
    other = [*model.embedding.parameters(), *model.head.parameters()]
    found = torch.optim.Muon(hidden, lr=0.02, weight_decay=0.01)
    return [found, adamw(other)]


def ours(model: Language, steps: int, batch: int) -> list[Any]:
    """Return this package's, with the recipe."""
    arguments = recipe(model, batch_size=batch, steps=steps)
    return [SIRFShampoo(model, batch_size=batch, **arguments)]


OPTIMIZERS: dict[str, Callable[[Language, int, int], list[Any]]] = {
    "AdamW": lambda model, steps, batch: [adamw(model.parameters())],
    "recipe": ours,
    "Muon": muon,
}
"""At the rates that are usual; none is searched for. AdamW tells how long a run is."""


def factor(progress: float) -> float:
    """Return the learning rate's part: warm-up, then a cosine, by the part done."""
    if progress < WARM_UP:
        return (progress + 1e-3) / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class Text:
    """Draws batches of the carried text, the same for everyone."""

    def __init__(self, size: Size, device: str) -> None:
        """Read the text; it stays on the device."""
        learnt, held_out, self.facts = text.load()
        self.size = size
        self.learnt, self.held_out = learnt.to(device), held_out.to(device)

    def windows(self, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs and targets ``[len(starts), context]``."""
        reach = torch.arange(self.size.context + 1, device=tokens.device)
        rows = tokens[starts[:, None] + reach].long()
        return rows[:, :-1], rows[:, 1:]

    def batch(self, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw a batch to learn from."""
        last = len(self.learnt) - self.size.context - 1
        starts = torch.randint(last, (self.size.batch,), generator=draw)
        device = self.learnt.device
        if device.type == "cuda":  # else the host would wait
            starts = starts.pin_memory()
        return self.windows(self.learnt, starts.to(device, non_blocking=True))

    def validation(self) -> list[tuple[Tensor, Tensor]]:
        """Return batches spread over what is held out."""
        last = len(self.held_out) - self.size.context - 1
        starts = torch.linspace(0, last, self.size.validation).long()
        parts = starts.to(self.held_out.device).split(self.size.batch)
        return [self.windows(self.held_out, part) for part in parts]


class Training:
    """One run of one optimizer, as long as it may take."""

    def __init__(self, name: str, words: Text, visit: Visit, steps: int) -> None:
        self.words, self.visit, self.device = words, visit, visit.device
        size = words.size
        self.model = size.build(words.facts["vocabulary"]).to(visit.device)
        self.optimizers = OPTIMIZERS[name](self.model, steps, size.batch)
        self.groups = [g for each in self.optimizers for g in each.param_groups]
        self.rates = [group["lr"] for group in self.groups]
        self.draw = torch.Generator().manual_seed(1)
        self.spans: list[tuple[Any, Any, Any]] = []  # start, before step(), end

    def mark(self) -> Any:
        """Return a mark in time, on the device where there is one."""
        if self.device == "cpu":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.model(inputs, targets)

    def step(self, progress: float) -> Tensor:
        """Take a step; return its loss, which the device may still compute."""
        start = self.mark()
        loss = self.loss(*self.words.batch(self.draw))
        loss.backward()
        for group, rate in zip(self.groups, self.rates, strict=True):
            group["lr"] = rate * factor(progress)
        middle = self.mark()
        for optimizer in self.optimizers:
            optimizer.step()
        for p in self.model.parameters():
            p.grad = None
        self.spans.append((start, middle, self.mark()))
        if self.device == "cuda" and len(self.spans) > 1:
            self.spans[-2][2].synchronize()  # one step ahead is enough
        return loss.detach()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss on what is held out."""
        self.model.eval()
        losses = [self.loss(x, y).float() for x, y in self.words.validation()]
        self.model.train()
        return float(torch.stack(losses).mean())

    def shares(self) -> dict[str, float]:
        """Return the milliseconds of a step, and the optimizer's part of them."""
        spans = self.spans[2:] or self.spans  # libraries set themselves up
        if self.device == "cpu":
            pairs = [(1e3 * (c - a), 1e3 * (c - b)) for a, b, c in spans]
        else:
            torch.cuda.synchronize()
            pairs = [(a.elapsed_time(c), b.elapsed_time(c)) for a, b, c in spans]
        whole, own = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        told = {"step_ms": whole, "optimizer_ms": own, "optimizer_share": own / whole}
        return {name: round(value, 4) for name, value in told.items()}

    def run(self, seconds: float, save: Callable[..., None]) -> None:
        """Learn for so long; evaluations do not count."""
        spent, told, losses = 0.0, [], []
        begin, due = perf_counter(), seconds / EVALUATIONS
        while spent < seconds:
            losses.append(self.step(spent / seconds))
            spent = told[-1]["seconds"] if told else 0.0
            spent += perf_counter() - begin
            if spent >= due or spent >= seconds:
                recent = float(torch.stack(losses[-10:]).mean())  # waits
                spent = (told[-1]["seconds"] if told else 0.0) + perf_counter() - begin
                point = {"step": len(losses), "seconds": round(spent, 3)}
                point |= {"train": round(recent, 4), "val": round(self.evaluate(), 4)}
                told.append(point)
                save(curve=told, steps=len(losses), **self.shares())
                begin, due = perf_counter(), due + seconds / EVALUATIONS
        each = torch.stack(losses).float().tolist()
        save(train_losses=[round(loss, 4) for loss in each])


def run(visit: Visit) -> None:
    """Train with each optimizer for the same seconds."""
    size = TINY if visit.tiny else Size()
    words, runs = Text(size, visit.device), []
    model: nn.Module = size.build(words.facts["vocabulary"])
    count = sum(p.numel() for p in model.parameters())
    facts = {"parameters": count, "size": vars(size), "text": words.facts}
    visit.save(**facts, runs=runs)
    steps = size.guess
    for number, name in enumerate(OPTIMIZERS):
        # a sixth for the start, the evaluations and the first step's set-up
        seconds = visit.left() / (len(OPTIMIZERS) - number) * 5 / 6 - 0.2
        seconds = min([seconds, *(r["seconds"] for r in runs)])
        seconds = min(seconds, 1.5) if visit.tiny else seconds
        found: dict[str, Any] = {"name": name, "error": None, "seconds": seconds}
        runs.append(found)

        def save(found: dict[str, Any] = found, **more: Any) -> None:
            found |= more
            visit.save(runs=runs, to_loss=to_loss(runs))

        try:
            if visit.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            training = Training(name, words, visit, steps)
            training.run(seconds, save)
            steps = found["steps"] if name == "AdamW" else steps
            if visit.device == "cuda":
                save(peak_bytes=torch.cuda.max_memory_allocated())
        except Exception as error:  # told; the next one goes on
            save(error=f"{type(error).__name__}: {error}"[:400])
        training = None
        gc.collect()
    if any(found["error"] for found in runs):
        raise RuntimeError("; ".join(f"{r['name']}: {r['error']}" for r in runs))


def to_loss(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return when each run reached what the worst of them reached in the end."""
    curves = {r["name"]: r.get("curve") or [] for r in runs if not r["error"]}
    if not curves or not all(curves.values()):
        return {}
    loss = max(min(p["val"] for p in curve) for curve in curves.values())
    first = {n: next(p for p in c if p["val"] <= loss) for n, c in curves.items()}
    reached = {n: {k: p[k] for k in ("step", "seconds")} for n, p in first.items()}
    return {"val": loss, "reached": reached}
