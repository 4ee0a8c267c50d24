"""Log loss, learning rate and what the optimizer tells of itself to TensorBoard.

python examples/tensorboard_logging.py --output out/tensorboard
tensorboard --logdir out/tensorboard
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import CosineAnnealingLR

try:
    from torch.utils.tensorboard import SummaryWriter
except ModuleNotFoundError as missing:
    sys.exit(f"No module {missing.name!r}: run `pip install -e '.[frameworks]'`.")

from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo

BATCH = 32
EVERY = 5  # `diagnostics` waits for the device once, so not in every step


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="out/tensorboard", help="folder")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"argument --steps: needs a number >= 1, got {args.steps}")

    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    teacher = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = SIRFShampoo(
        model,
        lr=0.01,
        beta2=0.2,
        lam=1e-4,
        combine_params=(LinearWeightBias(), PerParameter()),
    )
    scheduler = CosineAnnealingLR(optimizer, T_max=args.steps)

    logged: dict[str, list[float]] = defaultdict(list)
    with SummaryWriter(str(args.output)) as writer:

        def log(tag: str, value: float, step: int) -> None:
            writer.add_scalar(tag, value, step)
            logged[tag].append(value)

        for step in range(args.steps):
            x = torch.randn(BATCH, 8)
            with torch.no_grad():
                y = teacher(x)
            optimizer.zero_grad()
            loss = mse_loss(model(x), y)
            loss.backward()
            optimizer.step()
            log("train/loss", loss.item(), step)
            log("train/lr", scheduler.get_last_lr()[0], step)
            if step % EVERY == 0 or step == args.steps - 1:
                for name, value in optimizer.diagnostics().items():
                    log(f"optimizer/{name}", value, step)
            scheduler.step()

    losses = logged["train/loss"]
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {args.steps} steps")
    for tag, values in logged.items():
        print(f"{tag}: {len(values)} values, the last is {values[-1]:.4g}")
    print(f"See them: tensorboard --logdir {args.output}")
    return dict(logged)


if __name__ == "__main__":
    main()
