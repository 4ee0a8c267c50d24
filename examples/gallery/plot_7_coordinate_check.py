"""
The same movement at every width and depth
==========================================

A learning rate that was found on a small network is worth something on a large one only
if it does the same there. What it does to the network can be looked at: how far the
activations of the last hidden layer move in the first steps, beside their size. This is
the coordinate check of Yang et al., *Tensor Programs V* (arXiv 2203.03466).
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from sirfshampoo import SIRFShampoo, recipe

# %%
# A residual network of any width and depth
# -----------------------------------------
# Each block's share of the sum is 1 / √depth, as when a residual network starts.

x = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
y = torch.randint(5, (256,), generator=torch.Generator().manual_seed(1))


class Residual(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.first, self.head = nn.Linear(20, width), nn.Linear(width, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
            for _ in range(depth)
        )

    def hidden(self, x):
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h) / len(self.blocks) ** 0.5
        return h


def movement(build, width, depth, steps=5):
    """Return how far the activations move in a few steps, beside their size."""
    torch.manual_seed(0)
    model = Residual(width, depth)
    optimizer, before = build(model), model.hidden(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model.head(model.hidden(x)), y).backward()
        optimizer.step()
    return float((model.hidden(x).detach() - before).norm() / before.norm())


# %%
# AdamW beside the recipe
# -----------------------
# With AdamW, an entry moves by the rate, whatever the matrix's size: the wider the
# layer, the more such moves add up in an activation. A step of the recipe has the size
# of a matrix with orthonormal rows, and its rate falls with the root of the number of
# weights, since the steps of a chain of layers add up.

contestants = {
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3),
    "the recipe": lambda model: SIRFShampoo(
        model.parameters(), **recipe(model, batch_size=len(x))
    ),
}
sizes = {
    "width": [(width, 4) for width in (64, 128, 256, 512, 1024)],
    "depth": [(64, depth) for depth in (2, 4, 8, 16, 32)],
}
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
for ax, (what, shapes) in zip(axes, sizes.items(), strict=True):
    for name, build in contestants.items():
        moved = [movement(build, *shape) for shape in shapes]
        ax.plot([s[what == "depth"] for s in shapes], moved, "o-", label=name)
        print(
            f"{name}, by {what}: the most is {max(moved) / min(moved):.1f} × the least"
        )
    ax.set(xscale="log", yscale="log", xlabel=what)
    ax.set_xticks([s[what == "depth"] for s in shapes])
    ax.set_yticks([0.1, 0.2, 0.4, 0.8])
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:g}")
    ax.minorticks_off()
    ax.grid(alpha=0.3)
axes[0].set_ylabel("movement of activations, relative")
axes[1].legend()
plt.show()
