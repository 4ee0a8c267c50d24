"""The networks of the held-out tasks; embeddings and heads can be told by name."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.data import Data, load
from benchmarks.training.held_out_data import ITEMS, USERS
from benchmarks.training.models import Block, Transformer, WithHead


def normalized_mlp(inputs: int, width: int) -> nn.Module:
    """Three linear layers with batch norms, for one number."""
    layers: list[nn.Module] = []
    for size in (inputs, width):
        layers += [nn.Linear(size, width), nn.BatchNorm1d(width), nn.ReLU()]
    return WithHead(nn.Sequential(*layers), width, 1)


class Factorization(nn.Module):
    """Multiplies a user's and an item's vector; the mean has to be learned, too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.user_embedding = nn.Embedding(USERS, width)
        self.item_embedding = nn.Embedding(ITEMS, width)
        self.user_bias_embedding = nn.Embedding(USERS, 1)
        self.item_bias_embedding = nn.Embedding(ITEMS, 1)
        for vectors in (self.user_embedding, self.item_embedding):
            nn.init.normal_(vectors.weight, std=0.1)
        for biases in (self.user_bias_embedding, self.item_bias_embedding):
            nn.init.zeros_(biases.weight)

    def forward(self, pairs: Tensor) -> Tensor:  # [batch, 2] -> [batch]
        user, item = pairs.unbind(-1)
        products = self.user_embedding(user) * self.item_embedding(item)
        biases = self.user_bias_embedding(user) + self.item_bias_embedding(item)
        return products.sum(-1) + biases.squeeze(-1)


def tanh_mlp(width: int) -> nn.Module:
    """Four linear layers, from a number to a number."""
    layers: list[nn.Module] = []
    for size in (1, width, width):
        layers += [nn.Linear(size, width), nn.Tanh()]
    return WithHead(nn.Sequential(*layers), width, 1)


def deep_plain(layers: int, width: int) -> nn.Module:
    """Linear layers and ReLUs alone, with He's initialization."""
    body = nn.Sequential(nn.Flatten())
    for i in range(layers - 1):
        body += nn.Sequential(nn.Linear(width if i else 64, width), nn.ReLU())
    model = WithHead(body, width, 10)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model


class _ResidualMLP(nn.Module):
    """A norm and two linear layers beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [batch, width]
        return x + self.down(F.relu(self.up(self.norm(x))))


def deep_residual(blocks: int, width: int) -> nn.Module:
    """Pre-norm residual blocks between a linear layer and a head."""
    stack = [_ResidualMLP(width) for _ in range(blocks)]
    stem = (nn.Flatten(), nn.Linear(64, width))
    return WithHead(nn.Sequential(*stem, *stack, nn.LayerNorm(width)), width, 10)


class VisionTransformer(nn.Module):
    """Sees images of 8 x 8 as 16 patches of 2 x 2."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(4, width)
        self.position_embedding = nn.Embedding(16, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)
        blocks = (Block(width, heads=4, causal=False) for _ in range(layers))
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:  # [batch, 8, 8] -> [batch, 10]
        patches = F.unfold(images.unsqueeze(1), 2, stride=2).mT  # [batch, 16, 4]
        x = self.patch_embedding(patches) + self.position_embedding.weight
        return self.head(self.norm(self.blocks(x)).mean(1))


class VAE(nn.Module):
    """Codes images as normal distributions, and draws from them."""

    def __init__(self, hidden: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(hidden, code), nn.Linear(hidden, code)
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.ReLU())
        self.head = nn.Linear(hidden, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pixels' logits [batch, 64], and each code's mean and variance."""
        hidden = self.encoder(images.flatten(1))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        # every look at a loss draws the same
        fixed = None if self.training else torch.Generator().manual_seed(0)
        noise = torch.randn(mean.shape, generator=fixed)
        code = mean + (log_variance / 2).exp() * noise
        return self.head(self.decoder(code)), mean, log_variance


class GRU(nn.Module):
    """Reads a sequence, and answers with a number at its end."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, width, batch_first=True)
        self.head = nn.Linear(width, 1)

    def forward(self, sequences: Tensor) -> Tensor:  # [batch, time, inputs] -> [b, 1]
        hidden, _ = self.gru(sequences)
        return self.head(hidden[:, -1])


def fine_tuned(data: Data) -> nn.Module:
    """Give a new head to layers that know the digits from 0 to 4."""
    return WithHead(_pretrained(), 64, data.classes)


class _Adapted(nn.Module):
    """A frozen linear layer, and beside it a product of two thin ones, 0 at first."""

    def __init__(self, frozen: nn.Linear, rank: int) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.up(self.down(x))


def adapted(data: Data, rank: int) -> nn.Module:
    """Freeze layers that know the digits from 0 to 4; add adapters and a head."""
    layers = [
        _Adapted(layer, rank) if isinstance(layer, nn.Linear) else layer
        for layer in _pretrained()
    ]
    return WithHead(nn.Sequential(*layers), 64, data.classes)


def _pretrained(steps: int = 200, batch_size: int = 64) -> nn.Sequential:
    """Train layers on the digits from 0 to 4: the same ones, whatever the seed is."""
    data = load("low digits")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        )
        model = WithHead(body, 64, data.classes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            batch = data.train.rows(torch.randint(len(data.train), (batch_size,)))
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs), batch.targets).backward()
            optimizer.step()
    model.zero_grad()
    return body


def gpt2(vocabulary: int, context: int, width: int, layers: int) -> nn.Module:
    """Return a transformer with GPT-2's initialization: all weights are small."""
    model = Transformer(vocabulary, context, width, layers)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    return model


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],))


def _rotated(x: Tensor) -> Tensor:  # [..., time, size]
    """Turn pairs of entries by angles that grow with the position."""
    time, half = x.shape[-2], x.shape[-1] // 2
    rates = 1000.0 ** -torch.linspace(0, 1, half)
    angles = torch.outer(torch.arange(time), rates)  # [time, half]
    a, b = x.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


class _FastBlock(nn.Module):
    """Attention and squared ReLUs, without weights in norms and without biases."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        for last in (self.proj, self.down):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:  # [batch, time, width]
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [b, heads, t, 32]
            for part in self.qkv(_rms_norm(x)).chunk(3, dim=-1)
        )
        q, k = _rotated(_rms_norm(q)), _rotated(_rms_norm(k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).flatten(-2))
        return x + self.down(F.relu(self.up(_rms_norm(x))).square())


class FastTransformer(nn.Module):
    """A decoder as in the speed-runs of GPT-2."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*(_FastBlock(width) for _ in range(layers)))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, text: Tensor) -> Tensor:  # [batch, time] -> [batch, time, vocab]
        return self.head(_rms_norm(self.blocks(_rms_norm(self.embedding(text)))))


def residual_of_boundary_problem(model: nn.Module, points: Tensor) -> Tensor:
    """Return what is wrong with u'' = -π² sin πx, and, ten times, with u(0) = u(1) = 0.

    Args:
        model: The solution u.
        points: Where the equation is to hold, [batch, 1]; both ends take the place of
            the last two.
    """
    x = torch.cat([points[:-2], torch.tensor([[0.0], [1.0]])]).requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    wrong = (bend + math.pi**2 * (math.pi * x).sin())[:-2]
    return wrong.square().mean() + 10 * u[-2:].square().sum()
