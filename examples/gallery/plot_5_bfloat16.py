"""
A convolutional network in bfloat16
===================================

Pictures of digits, a network of convolutions, and factors in half precision: nothing is
decomposed, so bfloat16 needs no fall-back. The model itself runs under autocast.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from sirfshampoo import SIRFShampoo, recipe, summary

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
labels = torch.tensor(digits.target)
order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
train_set, test_set = order[:1200], order[1200:]
batch, steps = 64, 150


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 10),
    )


# %%
# What it will take
# -----------------
# With the recipe, a convolution's weight has factors for outputs, for inputs, and for
# the pixels of its kernel. In bfloat16 they take half as much.

arguments = recipe(make_net(), batch_size=batch, steps=steps)
for dtype in (torch.float32, torch.bfloat16):
    told = summary(make_net(), **arguments, preconditioner_dtypes=dtype)
    print(dtype, f"{told.totals['factor_bytes']:,} bytes of factors")
print(told)

# %%
# Train in each precision
# -----------------------


def train(dtype, autocast):
    net = make_net()
    optimizer = SIRFShampoo(net, **arguments, preconditioner_dtypes=dtype)
    schedule = OneCycleLR(
        optimizer, arguments["lr"], steps + 1, pct_start=0.1, cycle_momentum=False
    )
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(steps):
        at = train_set[torch.randint(len(train_set), (batch,), generator=generator)]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(net(images[at]), labels[at])
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    with torch.no_grad():
        right = net(images[test_set]).argmax(1) == labels[test_set]
    return losses, right.float().mean().item()


fig, ax = plt.subplots(figsize=(7, 4), layout="constrained")
for name, dtype, autocast in (
    ("float32", torch.float32, False),
    ("factors in bfloat16", torch.bfloat16, False),
    ("factors in bfloat16, autocast", torch.bfloat16, True),
):
    losses, accuracy = train(dtype, autocast)
    ax.semilogy(torch.tensor(losses).unfold(0, 10, 1).mean(1), label=name)
    print(f"{name:30} test accuracy {100 * accuracy:.1f} %")
ax.set(xlabel="step", ylabel="training loss, mean of ten")
ax.legend(frameon=False)
