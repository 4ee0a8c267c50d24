"""
A character transformer
=======================

A transformer of one block learns to spell: its text is the help pages that come with
Python, so that nothing is downloaded. The recipe is held against AdamW with its usual
learning rate and with three times as much; all have the same schedule.

This is a short run by step. How long a step takes, and how longer runs end beside more
optimizers, is measured apart.
"""

import pydoc_data.topics

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from sirfshampoo import SIRFShampoo, recipe

text = "".join(pydoc_data.topics.topics.values())
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(c) for c in text[:200_000]])
length, width, batch, steps = 32, 48, 16, 120

# %%
# The model
# ---------


class Speller(nn.Module):
    """Predict the next character."""

    def __init__(self):
        super().__init__()
        self.token = nn.Embedding(len(alphabet), width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.block = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(alphabet))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def forward(self, tokens):
        x = self.token(tokens) + self.place
        return self.head(self.norm(self.block(x, self.mask, is_causal=True)))


# %%
# The loop
# --------
# The same for both: only the line that builds the optimizer differs.


def train(make):
    torch.manual_seed(0)
    model = Speller()
    optimizer, lr = make(model)
    schedule = OneCycleLR(optimizer, lr, steps + 1, pct_start=0.1, cycle_momentum=False)
    losses = []
    for _ in range(steps):
        at = torch.randint(len(codes) - length - 1, (batch, 1))
        tokens = codes[at + torch.arange(length + 1)]
        logits = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


def adamw(lr):
    return lambda model: (torch.optim.AdamW(model.parameters(), lr=lr), lr)


def ours(model):
    arguments = recipe(model, batch_size=batch, steps=steps)
    return SIRFShampoo(model, **arguments), arguments["lr"]


curves = {
    "AdamW, 1e-3": train(adamw(1e-3)),
    "AdamW, 3e-3": train(adamw(3e-3)),
    "SIRFShampoo, the recipe": train(ours),
}

# %%
# What they reach
# ---------------

fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for name, losses in curves.items():
    smooth = torch.tensor(losses).unfold(0, 10, 1).mean(1)
    ax.plot(range(9, steps), smooth, label=name)
    print(f"{name:24} loss {smooth[-1]:.3f}")
ax.set(xlabel="step", ylabel="training loss, mean of ten")
ax.legend(frameon=False)
