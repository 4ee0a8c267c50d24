"""
A physics-informed network
==========================

A small network solves −u″ = π² sin(πx) with u(0) = u(1) = 0 from the equation alone.
Its loss holds second derivatives, and is known to be badly conditioned: first-order
optimizers creep. Factors of a network this small cost little.

The batch size is worth a thought: the points are the examples, and there is one forward
pass for the equation and one for the boundary, so the number is given as an integer.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from sirfshampoo import SIRFShampoo, recipe

points, steps = 64, 400


def make_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def residual_loss(net, x):
    """Return the mean square of −u″ − π² sin(πx), and of u at the boundary."""
    x = x.requires_grad_()
    u = net(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    equation = (-ddu - torch.pi**2 * (torch.pi * x).sin()).square().mean()
    return equation + 100 * net(torch.tensor([[0.0], [1.0]])).square().mean()


# %%
# Train
# -----


def train(make):
    net = make_net()
    optimizer, lr = make(net)
    schedule = OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1, cycle_momentum=False)
    generator, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        loss = residual_loss(net, torch.rand(points, 1, generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return net, losses


def ours(net):
    arguments = recipe(net, batch_size=points, steps=steps, weight_decay=0.0)
    return SIRFShampoo(net, **arguments, batch_size=points), arguments["lr"]


runs = {
    f"AdamW, {lr:g}": train(
        lambda net, lr=lr: (
            torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.0),
            lr,
        )
    )
    for lr in (1e-3, 1e-2)
}
runs["SIRFShampoo, the recipe"] = train(ours)

# %%
# The solution, and its error
# ---------------------------

x = torch.linspace(0, 1, 200)[:, None]
exact = (torch.pi * x).sin()
fig, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
for name, (net, losses) in runs.items():
    error = (net(x).detach() - exact).abs()
    axes[0].semilogy(torch.tensor(losses).unfold(0, 20, 1).mean(1), label=name)
    axes[1].semilogy(x, error + 1e-9, label=name)
    print(f"{name:24} loss {losses[-1]:.2e}, largest error {error.max():.2e}")
axes[0].set(xlabel="step", ylabel="loss, mean of 20", title="training")
axes[1].set(xlabel="x", ylabel="|u − sin(πx)|", title="error of the solution")
axes[0].legend(frameon=False)
