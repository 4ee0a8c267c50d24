"""The networks of the tasks, named so that embeddings and heads can be told."""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """A pre-norm transformer layer: attention, then two linear layers."""

    def __init__(self, width: int, heads: int, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, heads, t, w/h]
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Predicts the next character at every position."""

    def __init__(self, vocabulary: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary)
        for embedding in (self.embedding, self.position_embedding):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocab]
        position = self.position_embedding.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(self.embedding(text) + position)))


class LSTM(nn.Module):
    """Predicts the next character at every position, with one recurrent layer."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, text: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocab]
        hidden, _ = self.lstm(self.embedding(text))
        return self.head(hidden)


class _Residual(nn.Module):
    """Two convolutions beside a shortcut, with batch norms."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        stride = 1 if width == out else 2
        self.conv1 = nn.Conv2d(width, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if width != out:
            self.shortcut.append(nn.Conv2d(width, out, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:  # [batch, width, h, w]
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet(nn.Module):
    """A small residual network for grey images of 28 x 28."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.stages = nn.Sequential(
            _Residual(16, 16), _Residual(16, 32), _Residual(32, 64)
        )
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:  # [batch, 1, 28, 28]
        return self.head(self.stages(self.stem(images)).mean((-2, -1)))


class WithHead(nn.Module):
    """Layers, then a linear head of that name."""

    def __init__(self, body: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = body, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def digits_cnn() -> nn.Module:
    """Two convolutions and two linear layers for 8 x 8 images."""
    body = nn.Sequential(
        nn.Unflatten(1, (1, 8)),  # a channel
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
    )
    return WithHead(body, 64, 10)


def mnist_cnn() -> nn.Module:
    """Three convolutions and two linear layers for 28 x 28 images."""
    body = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
    )
    return WithHead(body, 64, 10)


def digits_mlp() -> nn.Module:
    """Three linear layers."""
    body = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
    )
    return WithHead(body, 64, 10)


def autoencoder() -> nn.Module:
    """Squeeze 64 pixels through a bottleneck of 12 numbers."""
    widths = (64, 128, 64, 12, 64, 128, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for width, out in pairwise(widths):
        layers += [nn.Linear(width, out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])  # the pixels come without a nonlinearity


def linear(inputs: int, outputs: int) -> nn.Module:
    """Return a linear layer that starts at zero, as its problem is convex."""
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
    return layer
