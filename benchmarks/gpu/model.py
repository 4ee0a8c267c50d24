"""A language model of the size of GPT-2 small, as it is built today."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear(inputs: int, outputs: int, *, zero: bool = False) -> nn.Linear:
    """Return a layer without bias; one that writes to the stream starts at zero."""
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.zeros_(layer.weight) if zero else nn.init.normal_(
        layer.weight, std=inputs**-0.5
    )
    return layer


class Norm(nn.Module):
    """RMSNorm without a gain: what follows is linear, and has one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))


class Attention(nn.Module):
    """Causal attention with rotary positions and normed queries and keys."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads, self.norm = heads, Norm()
        # three matrices: each is pre-conditioned by itself
        self.query, self.key, self.value = (linear(width, width) for _ in range(3))
        self.out = linear(width, width, zero=True)
        half = width // heads // 2
        angles = torch.outer(torch.arange(context), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def rotate(self, x: Tensor) -> Tensor:  # [batch, heads, context, width / heads]
        a, b = x.chunk(2, -1)
        turned = [a * self.cos - b * self.sin, a * self.sin + b * self.cos]
        return torch.cat(turned, -1).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        q, k = (self.rotate(self.norm(y)).to(v.dtype) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention, then two layers with the square of ReLU between."""

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.norm = Norm()
        self.attention = Attention(width, heads, context)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.relu(self.up(self.norm(x))).square())


class Language(nn.Module):
    """Predicts each token from those before it; returns the mean loss."""

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(
            *(Block(width, heads, context) for _ in range(layers))
        )
        self.norm = Norm()
        self.head = linear(width, vocabulary, zero=True)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.embedding(tokens)))
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
