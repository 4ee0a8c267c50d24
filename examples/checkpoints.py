"""Train a small character model that may be killed at any moment.

Every few steps, all that the next step depends on goes into one file: the states of
model, optimizer, scheduler and random numbers, and the step. Whatever ends the run,
the same command goes on from the last complete file, and ends with the same bits as a
run that was never interrupted: compare the digests.

    python examples/checkpoints.py                   # kill it, start it again
    python examples/checkpoints.py --folder out/b    # never interrupted
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

try:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn

    from sirfshampoo import SIRFShampoo
except ModuleNotFoundError as missing:
    sys.exit(
        f"The example needs the module {missing.name!r}: `make setup` installs all, or "
        "`pip install -e '.[demo]'` in the root of the repository."
    )

CONTEXT = 16  # characters from which the next one is predicted
BATCH = 32


@dataclass(frozen=True)
class Settings:
    """What a run is; a checkpoint of other settings is of another run."""

    steps: int = 1000
    every: int = 20  # steps from one checkpoint to the next
    width: int = 64  # of the hidden layer
    seed: int = 0


# --------------------------------------------------------------------- training


@cache
def read_text() -> tuple[Tensor, int]:
    """Return the help texts that Python ships as numbers, and how many letters."""
    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    vocabulary = {char: i for i, char in enumerate(sorted(set(text)))}
    return torch.tensor([vocabulary[char] for char in text]), len(vocabulary)


class Training:
    """All that changes from step to step."""

    def __init__(self, settings: Settings) -> None:
        """Start at step 0."""
        torch.manual_seed(settings.seed)
        # Sums of two threads round differently than sums of one, so every sitting
        # takes the same number.
        torch.set_num_threads(1)
        stream, letters = read_text()
        windows = stream.unfold(0, CONTEXT + 1, 1)  # a view: [windows, CONTEXT + 1]
        cut = int(0.9 * len(windows))
        self.train, self.val = windows[:cut], windows[cut + CONTEXT :: 50]

        self.settings = settings
        self.step = 0
        self.model = nn.Sequential(
            nn.Embedding(letters, 8),
            nn.Flatten(),
            nn.Linear(8 * CONTEXT, settings.width),
            nn.Tanh(),
            nn.Dropout(0.1),  # its random numbers, too, must go on where they stopped
            nn.Linear(settings.width, letters),
        )
        self.optimizer = SIRFShampoo(
            self.model,
            lr=3e-3,
            beta2=0.2,  # the default is too slow for a few hundred steps
            lam=1e-4,
            structures={1: "diagonal", 2: "dense"},
            preconditioner_dtypes=torch.bfloat16,
        )
        self.scheduler = CosineAnnealingLR(self.optimizer, T_max=settings.steps)

    def take_step(self) -> None:
        """Draw a batch and learn from it."""
        self.model.train()
        rows = torch.randint(len(self.train), (BATCH,))
        self.optimizer.zero_grad()
        self.loss_on(self.train[rows]).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.step += 1

    def loss_on(self, windows: Tensor) -> Tensor:
        """Return the mean cross-entropy of the characters that end the windows."""
        return F.cross_entropy(self.model(windows[:, :-1]), windows[:, -1])

    @torch.no_grad()
    def validate(self) -> float:
        """Return the loss on text that was not trained on."""
        self.model.eval()
        return self.loss_on(self.val).item()

    def digest(self) -> str:
        """Return a fingerprint of every bit of the parameters and of their state."""
        found = hashlib.sha256()
        for p in self.model.parameters():
            entries = self.optimizer.state[p]
            for tensor in [p.detach(), *(entries[key] for key in sorted(entries))]:
                found.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    # ------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return a checkpoint: tensors and plain values, no code."""
        return {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it is of a run with other settings.
        """
        if checkpoint["settings"] != asdict(self.settings):
            raise ValueError(
                f"The checkpoint is of a run with {checkpoint['settings']}, "
                f"not with {asdict(self.settings)}."
            )
        self.step = checkpoint["step"]
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scheduler.load_state_dict(checkpoint["scheduler"])
        torch.set_rng_state(checkpoint["random"])


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Replace the checkpoint at a path in one piece, or not at all."""
    # In the same folder: a rename across file systems would be a copy.
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(
            file.fileno()
        )  # the bytes are on the disk before the name points there
    os.replace(partial, path)
    if os.name == "posix":  # the new name survives a power failure, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def resume(settings: Settings, path: Path) -> Training:
    """Return the training as the last complete checkpoint has it, or a fresh one."""
    training = Training(settings)
    if path.exists():
        # weights_only: a file from elsewhere cannot run code
        training.load_state_dict(torch.load(path, weights_only=True))
    return training


def finish(
    training: Training,
    path: Path,
    after_step: Callable[[int], None] = lambda step: None,
) -> Training:
    """Take the steps that are left, and write checkpoints on the way."""
    settings = training.settings
    while training.step < settings.steps:
        training.take_step()
        if training.step % settings.every == 0 or training.step == settings.steps:
            write(training.state_dict(), path)
        after_step(training.step)
    return training


# ------------------------------------------------------------------------- main


def positive(text: str) -> int:
    """Read a whole number of at least 1 from the command line."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number >= 1, got {text!r}")
    return int(text)


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, default = parser.add_argument, Settings()
    add("--folder", type=Path, default="out/checkpoints", help="default: %(default)s")
    add("--steps", type=positive, default=default.steps, help="default: %(default)s")
    add(
        "--every",
        type=positive,
        default=default.every,
        help="steps from one checkpoint to the next, default: %(default)s",
    )
    add("--width", type=positive, default=default.width, help="default: %(default)s")
    add("--seed", type=int, default=default.seed, help="default: %(default)s")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Start or go on, then report."""
    args = read_arguments(argv)
    settings = Settings(args.steps, args.every, args.width, args.seed)
    path = args.folder / "checkpoint.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        training = resume(settings, path)
    except ValueError as error:
        sys.exit(f"{error} Delete {path} to start anew, or choose another --folder.")
    console = Console(highlight=False, soft_wrap=True)
    start = f"Going on after step {training.step}" if training.step else "Starting anew"
    console.print(f"{start}; checkpoints: {path}")

    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        bar = progress.add_task("steps", total=args.steps, completed=training.step)
        try:
            finish(training, path, lambda step: progress.update(bar, completed=step))
        except KeyboardInterrupt:
            sys.exit("Interrupted. The same command goes on from the last checkpoint.")
    console.print(f"Validation loss: {training.validate():.6f}")
    console.print(f"Digest: {training.digest()}")


if __name__ == "__main__":
    main()
