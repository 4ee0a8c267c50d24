"""Train with Hugging Face accelerate: accumulate, clip, save, load, compare.

python examples/accelerate_loop.py --help
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

try:
    from accelerate import Accelerator
except ModuleNotFoundError as missing:
    sys.exit(f"No module {missing.name!r}: run `pip install -e '.[frameworks]'`.")

from sirfshampoo import SIRFShampoo, recipe

BATCH, ACCUMULATE = 16, 2  # an optimizer step sees 16 * 2 examples
CLIP = 0.3  # the largest norm of a gradient


def teacher_data(seed: int, examples: int) -> TensorDataset:
    """Make inputs, and what a random network answers to them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(examples, 8, generator=generator)
    inner, outer = (torch.randn(8, n, generator=generator) / 3 for n in (8, 1))
    return TensorDataset(x, (x @ inner).tanh() @ outer)


@dataclass
class Run:
    """What a run leaves behind."""

    params: list[Tensor]
    losses: list[float] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)


def train(
    folder: Path, *, steps: int, seed: int, save_at: int = 0, resume_at: int = 0
) -> Run:
    """Train to the last step; save at one of them, or go on from what was saved."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    arguments = recipe(model, batch_size=BATCH * ACCUMULATE, steps=steps)
    optimizer = SIRFShampoo(model, **arguments)
    scheduler = OneCycleLR(  # a warm-up over a tenth of the steps, then a cosine
        optimizer,
        max_lr=arguments["lr"],
        total_steps=steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    loader = DataLoader(teacher_data(seed, steps * ACCUMULATE * BATCH), BATCH)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATE)
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, loader, scheduler
    )
    if resume_at:
        accelerator.load_state(str(folder))
        loader = accelerator.skip_first_batches(loader, resume_at * ACCUMULATE)

    run = Run([p.detach() for p in model.parameters()])
    optimizer.optimizer.register_step_pre_hook(
        lambda optimizer, *_: run.batch_sizes.append(optimizer.batch_size)
    )
    for x, y in loader:
        with accelerator.accumulate(model):
            loss = mse_loss(model(x), y)
            accelerator.backward(loss)  # divides by ACCUMULATE
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            # on all but the last micro-batch these three do nothing
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.losses.append(loss.item())
        if save_at and len(run.batch_sizes) == save_at and accelerator.sync_gradients:
            accelerator.save_state(str(folder))
    return run


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help=">= 2; default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="out/accelerate", help="folder")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"argument --steps: needs a number >= 2, got {args.steps}")
    how = {"steps": args.steps, "seed": args.seed}

    half = args.steps // 2
    whole = train(args.output, **how, save_at=half)
    resumed = train(args.output, **how, resume_at=half)
    start, end = (
        sum(part) / len(part) for part in (whole.losses[:4], whole.losses[-4:])
    )
    print(f"loss {start:.4f} -> {end:.4f} in {args.steps} steps")
    sizes = set(whole.batch_sizes)
    print(f"examples in a step: {sizes} ({ACCUMULATE} micro-batches of {BATCH})")
    pairs = zip(whole.params, resumed.params, strict=True)
    difference = max((p - q).abs().max().item() for p, q in pairs)
    print(f"resumed: parameters differ by {difference} from the uninterrupted run")
    if difference or resumed.losses != whole.losses[half * ACCUMULATE :]:
        sys.exit("The runs differ: they should be equal to the bit.")
    return {
        "losses": [start, end],
        "batch_sizes": whole.batch_sizes,
        "differences": {"resumed": difference},
    }


if __name__ == "__main__":
    main()
