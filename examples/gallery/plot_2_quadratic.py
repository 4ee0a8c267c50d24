"""
Learning a rotated quadratic
============================

A loss that is steep in one direction and flat in another, where neither is an axis of
the parameters: what a diagonal pre-conditioner cannot see, and a dense factor learns.
Every optimizer gets the learning rate of a list that does best, and the same decay of
it, so that none is held back by its settings.
"""

import matplotlib.pyplot as plt
import torch
from torch.optim.lr_scheduler import LinearLR

from sirfshampoo import SIRFShampoo

# %%
# The valley
# ----------
# Two parameters, condition number 1000, rotated by 30 degrees. Gradients are means over
# 32 noisy examples: that is what factors learn from. (With a condition number of 100,
# AdamW is ahead of all: a valley that is steep enough is needed to tell them apart.)

angle, curvatures = torch.tensor(torch.pi / 6), torch.tensor([1000.0, 1.0])
R = torch.stack(
    [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
)
hessian = R @ curvatures.diag() @ R.mT
root = torch.linalg.cholesky(hessian)  # examples with it have this Hessian
start, steps, batch = torch.tensor([-1.6, 1.2]), 200, 32


def loss_at(w):
    return 0.5 * ((w @ hessian) * w).sum(-1)


def train(make, lr):
    """Return the way that the parameters take."""
    generator = torch.Generator().manual_seed(0)
    w = torch.nn.Parameter(start.clone())
    optimizer, path = make([w], lr), [start]
    schedule = LinearLR(optimizer, 1.0, 0.01, total_iters=steps)
    for _ in range(steps):
        examples = torch.randn(batch, 2, generator=generator) @ root.mT
        noise = 0.05 * torch.randn(batch, generator=generator)
        error = examples @ w - noise
        optimizer.zero_grad()
        (0.5 * error.square().mean()).backward()
        optimizer.step()
        schedule.step()
        path.append(w.detach().clone())
    return torch.stack(path)


# %%
# Four ways down
# --------------


def sirf(structure):
    return lambda params, lr: SIRFShampoo(
        params,
        lr=lr,
        beta2=0.2,
        lam=1e-4,
        alpha1=0.5,
        exponent=0.5,
        structures=structure,
        batch_size=batch,
        initial_factors="gradient",
    )


contestants = {
    "SGD, momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.5),
    "AdamW": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.0),
    "SIRFShampoo, diagonal": sirf("diagonal"),
    "SIRFShampoo, dense": sirf("dense"),
}
rates = [10 ** (1 - k / 3) for k in range(15)]
paths = {}
for name, make in contestants.items():
    tried = {lr: train(make, lr) for lr in rates}
    tail = {lr: loss_at(path[-60:]).mean().item() for lr, path in tried.items()}
    best = min(rates, key=lambda lr: tail[lr] if tail[lr] == tail[lr] else float("inf"))
    paths[name] = tried[best]
    print(f"{name:22} lr {best:.2g}, loss in the second half {tail[best]:.2g}")

# %%
# The paths
# ---------

grid = torch.linspace(-2, 2, 200)
xs, ys = torch.meshgrid(grid, grid, indexing="xy")
level = loss_at(torch.stack([xs, ys], dim=-1))
fig, axes = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
axes[0].contour(xs, ys, level.log10(), levels=12, cmap="Greys", linewidths=0.7)
for name, path in paths.items():
    axes[0].plot(*path.T, ".-", label=name, linewidth=1.2, markersize=3)
    axes[1].semilogy(loss_at(path).clamp(min=1e-8), label=name)
axes[0].set(xlim=(-2, 2), ylim=(-2, 2), title="paths", aspect="equal")
axes[1].set(xlabel="step", ylabel="loss", title="by step")
axes[1].legend(frameon=False)
