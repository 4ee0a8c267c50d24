"""
What a structure keeps of a real gradient
=========================================

Every axis of a tensor has a factor K, learned from the matrix H = mat(G) mat(G)ᵀ of the
gradients. A structure keeps the part of H that it can hold, its projection Π(H). Here
are both, for the first layer of a network on 8 × 8 pictures of digits.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

from sirfshampoo import SIRFShampoo

torch.manual_seed(0)
digits = load_digits()
x = torch.tensor(digits.data, dtype=torch.float32) / 16
y = torch.tensor(digits.target)
model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))

# %%
# A real gradient
# ---------------
# The axis of 64 inputs is that of the pixels, row by row. H shows which of them have
# gradients together: neighbours, and pixels above each other, 8 apart.

loss = nn.functional.cross_entropy(model(x), y)
loss.backward()
G = model[0].weight.grad
H = G.mT @ G
H /= H.diagonal().mean()

fig, ax = plt.subplots(figsize=(4, 3.4), layout="constrained")
image = ax.imshow(H, cmap="RdBu_r", vmin=-2, vmax=2)
ax.set(title="H of the 64 pixels", xticks=[], yticks=[])
fig.colorbar(image)

# %%
# Its projections
# ---------------
# The classes of the structures are in ``SIRFShampoo.SUPPORTED_STRUCTURES``;
# ``from_dense`` is their definition. The Toeplitz structures hold twice the mean of
# each diagonal of H in one triangle: a factor is a triangle, what it means is both.

names = SIRFShampoo.SUPPORTED_STRUCTURES
fig, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
for ax, (name, structure) in zip(axes.flat, names.items(), strict=True):
    projected = structure.from_dense(H)
    ax.imshow(projected.to_dense(), cmap="RdBu_r", vmin=-2, vmax=2)
    stored = structure.num_stored(64)
    ax.set(title=f"{name}\n{stored:,} numbers", xticks=[], yticks=[])

# %%
# What a factor makes of it
# -------------------------
# After some updates K Kᵀ approaches the inverse of what H is on average, as far as the
# structure can. Seen through the factor, the gradients then have no direction left that
# stands out: the eigenvalues of Kᵀ H K come together. A diagonal factor evens out the
# scale of the pixels, blocks remove what neighbours have in common, dense factors all.

for name in ("diagonal", "block16diagonal", "dense"):
    optimizer = SIRFShampoo(
        model, lr=0.0, beta2=0.2, lam=1e-4, structures={1: "diagonal", 2: name}
    )
    for _ in range(150):
        batch = torch.randint(len(x), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    K = optimizer.preconditioner[0][1].to_dense()
    seen = torch.linalg.eigvalsh(K.mT @ H @ K).clamp(min=1e-9).flip(0)
    top = (seen[:8] / seen[:8].mean()).tolist()
    print(f"{name:16}", " ".join(f"{value:5.2f}" for value in top))
