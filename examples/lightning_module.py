"""Train in PyTorch Lightning: accumulate, clip, save, resume, compare.

Lightning hands every optimizer a closure, hence `allow_closure=True`. All the rest is
as with AdamW: automatic and manual optimization, clipping, hooks, "16-mixed" precision.

    python examples/lightning_module.py --help
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

try:
    import pytorch_lightning as pl
except ModuleNotFoundError as missing:
    sys.exit(f"No module {missing.name!r}: run `pip install -e '.[frameworks]'`.")

from sirfshampoo import SIRFShampoo, recipe

BATCH, ACCUMULATE = 16, 2  # an optimizer step sees 16 * 2 examples
CLIP = 0.3  # the largest norm of a gradient


class Regression(pl.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
        self.losses: list[float] = []
        self.batch_sizes: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = mse_loss(self.net(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        arguments = recipe(self.net, batch_size=BATCH * ACCUMULATE, steps=self.steps)
        # not `self`: Lightning never calls it, and forward passes tell the batch size
        optimizer = SIRFShampoo(self.net, allow_closure=True, **arguments)
        schedule = OneCycleLR(  # a warm-up over a tenth of the steps, then a cosine
            optimizer,
            max_lr=arguments["lr"],
            total_steps=self.steps + 1,
            pct_start=0.1,
            cycle_momentum=False,
        )
        scheduler = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_before_optimizer_step(self, optimizer: SIRFShampoo) -> None:
        self.batch_sizes.append(optimizer.batch_size)


def teacher_data(seed: int, examples: int) -> TensorDataset:
    """Make inputs, and what a random network answers to them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator)
    inner, outer = (torch.randn(8, n, generator=generator) / 3 for n in (8, 1))
    return TensorDataset(x, (x @ inner).tanh() @ outer)


def train(
    folder: Path, *, steps: int, seed: int, resume_from: Path | None = None
) -> Regression:
    """Train for two epochs; leave a checkpoint after each, or go on from one."""
    torch.manual_seed(seed)
    module = Regression(steps)
    epoch = steps // 2
    saving = pl.callbacks.ModelCheckpoint(
        folder,
        filename="{step}",
        save_top_k=0 if resume_from else -1,  # none, or all
        enable_version_counter=False,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,  # with max_steps Lightning 2.6 resumes a batch late
        accumulate_grad_batches=ACCUMULATE,
        gradient_clip_val=CLIP,
        callbacks=[saving],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(teacher_data(seed, epoch * ACCUMULATE * BATCH), BATCH)
    trainer.fit(module, loader, ckpt_path=resume_from)
    if trainer.global_step != steps:
        sys.exit(f"Lightning counted {trainer.global_step} steps of {steps}.")
    return module


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="even; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="out/lightning", help="folder")
    args = parser.parse_args(argv)
    if args.steps < 2 or args.steps % 2:
        parser.error(f"argument --steps: needs an even number >= 2, got {args.steps}")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    how = {"steps": args.steps, "seed": args.seed}

    whole = train(args.output, **how)
    checkpoint = args.output / f"step={args.steps // 2}.ckpt"
    resumed = train(args.output, **how, resume_from=checkpoint)
    start, end = (
        sum(part) / len(part) for part in (whole.losses[:4], whole.losses[-4:])
    )
    print(f"loss {start:.4f} -> {end:.4f} in {args.steps} steps")
    sizes = set(whole.batch_sizes)
    print(f"examples in a step: {sizes} ({ACCUMULATE} micro-batches of {BATCH})")
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    difference = max((p - q).abs().max().item() for p, q in pairs)
    print(f"resumed: parameters differ by {difference} from the uninterrupted run")
    if difference or resumed.losses != whole.losses[len(whole.losses) // 2 :]:
        sys.exit("The runs differ: they should be equal to the bit.")
    return {
        "losses": [start, end],
        "batch_sizes": whole.batch_sizes,
        "differences": {"resumed": difference},
    }


if __name__ == "__main__":
    main()
