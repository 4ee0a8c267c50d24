"""
Reading ``diagnostics()`` in TensorBoard
========================================

``optimizer.diagnostics()`` is a dictionary of floats. It goes into any logger by one
loop; here into TensorBoard's files, and from there into a picture. Amid the run one
batch is spoiled, and the numbers tell which layers saw it and what they did.
"""

import tempfile

import matplotlib.pyplot as plt
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.tensorboard import SummaryWriter

from sirfshampoo import SIRFShampoo, recipe

torch.manual_seed(0)
batch, steps = 32, 200
teacher = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
arguments = recipe(model, batch_size=batch, steps=steps)
optimizer = SIRFShampoo(model, **arguments)
schedule = OneCycleLR(
    optimizer, arguments["lr"], steps + 1, pct_start=0.1, cycle_momentum=False
)

# %%
# Write
# -----
# In a run of your own, every few steps is enough: ``diagnostics`` waits for the device.

folder = tempfile.mkdtemp()
with SummaryWriter(folder) as writer:
    for step in range(steps):
        x = torch.randn(batch, 8)
        with torch.no_grad():
            y = teacher(x)
        if step == 120:
            y[0] = float("nan")  # a spoiled example
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        writer.add_scalar("train/loss", loss.item(), step)
        for name, value in optimizer.diagnostics().items():
            writer.add_scalar(f"optimizer/{name}", value, step)

# %%
# Read
# ----
# ``tensorboard --logdir`` shows the same.

events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()


def curve(tag):
    return [event.value for event in events.Scalars(tag)]


fig, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
axes[0, 0].semilogy(curve("train/loss"), color="black")
axes[0, 0].set_title("loss: missing where it was NaN")
for name in ("0.weight", "2.weight"):
    axes[0, 1].semilogy(curve(f"optimizer/{name}/update_rms"), label=name)
    axes[1, 0].plot(curve(f"optimizer/{name}/skipped"), label=name)
    axes[1, 1].semilogy(curve(f"optimizer/{name}/K0_norm"), label=name)
axes[0, 1].set_title("root mean square of an update")
axes[1, 0].set_title("steps sat out: the spoiled batch")
axes[1, 1].set_title("norm of the first factor")
for ax in axes[1]:
    ax.set_xlabel("step")
axes[0, 1].legend(frameon=False)

told = optimizer.diagnostics()
print({name: value for name, value in told.items() if name.endswith("skipped")})
