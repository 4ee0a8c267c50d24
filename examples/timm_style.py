"""Train a small vision transformer with the parameter groups of timm.

timm sorts parameters into groups with and without weight decay and constructs
`cls(groups, **options)`: no model, but the recipe tells the batch size, too.
`create_optimizer` below does what timm's `create_optimizer_v2` does; timm itself is not
needed. How to register the class there is shown in `docs/frameworks/timm.md`.

    python examples/timm_style.py --help
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from sirfshampoo import SIRFShampoo, recipe

BATCH, SIZE, PATCH, WIDTH = 32, 16, 4, 32


class SmallViT(nn.Module):
    """Tell stripes that lie, stand, rise and fall apart."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        tokens = (SIZE // PATCH) ** 2 + 1
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, tokens, WIDTH))
        self.block = nn.TransformerEncoderLayer(
            WIDTH, 4, 64, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        return self.head(self.norm(self.block(x + self.pos_embed))[:, 0])


def stripes(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw a batch of noisy stripes of any phase, and their directions."""
    y = torch.randint(4, (BATCH,), generator=generator)
    row, column = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    lines = torch.stack([row, column, row + column, row - column])[y]
    phase = 6.28 * torch.rand(BATCH, 1, 1, generator=generator)
    noise = 0.3 * torch.randn(BATCH, SIZE, SIZE, generator=generator)
    return ((1.2 * lines + phase).sin() + noise).unsqueeze(1), y


def create_optimizer(
    model: nn.Module,
    opt_class: Callable[..., Optimizer],
    *,
    lr: float,
    weight_decay: float,
    **options: Any,
) -> Optimizer:
    """Do what timm does: no decay for vectors and for what the model names."""
    decay, rest = [], []
    for name, p in model.named_parameters():
        exempt = p.ndim <= 1 or name in ("cls_token", "pos_embed")
        (rest if exempt else decay).append(p)
    groups = [
        {"params": rest, "weight_decay": 0.0},
        {"params": decay, "weight_decay": weight_decay},
    ]
    return opt_class(groups, lr=lr, weight_decay=0.0, **options)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="default: 40")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default="out/timm.pt", help="weights")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"argument --steps: needs a number >= 1, got {args.steps}")

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = SmallViT()
    arguments = recipe(model, batch_size=BATCH, steps=args.steps)
    kappa = arguments.pop("kappa")
    optimizer = create_optimizer(model, SIRFShampoo, weight_decay=kappa, **arguments)
    schedule = OneCycleLR(  # a warm-up over a tenth of the steps, then a cosine
        optimizer,
        max_lr=arguments["lr"],
        total_steps=args.steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    losses = []
    for _ in range(args.steps):
        x, y = stripes(generator)
        loss = cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    x, y = stripes(generator)
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), args.output)

    decays = {group["kappa"] for group in optimizer.param_groups}
    print(f"{len(optimizer.param_groups)} groups, weight decay {sorted(decays)}")
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f} in {args.steps} steps")
    print(f"new images: {accuracy:.0%} right; weights: {args.output}")
    kappas = {
        id(p): group["kappa"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    return {
        "losses": losses,
        "accuracy": accuracy,
        "kappa": {name: kappas[id(p)] for name, p in model.named_parameters()},
        "batch_size": optimizer.batch_size,
    }


if __name__ == "__main__":
    main()
