"""What the recipe promises to be free of: scale, batch, order, width and depth."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sirfshampoo import SIRFShampoo, recipe

STEPS = 30
Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def network(
    width: int = 24, depth: int = 2, dtype: torch.dtype = torch.float64
) -> nn.Sequential:
    """Return a network with embeddings, norms, convolutions and linear layers."""
    torch.manual_seed(0)
    layers = [nn.Conv1d(3, width, 3), nn.Flatten(), nn.Linear(4 * width, width)]
    for _ in range(depth):
        layers += [nn.LayerNorm(width), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, 5)).to(dtype)


def data(dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Return batches."""
    draw = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 3, 6, generator=draw, dtype=torch.float64).to(dtype),
            torch.randint(5, (16,), generator=draw),
        )
        for _ in range(STEPS)
    ]


def trained(
    model: nn.Module,
    *,
    scale: float = 1.0,
    change: Change = lambda x, y: (x, y),
    rate: float = 1.0,
    steps: int = STEPS,
) -> Tensor:
    """Train; return all parameters."""
    dtype = next(model.parameters()).dtype
    batches = [change(x, y) for x, y in data(dtype)]
    arguments = recipe(
        model, batch_size=len(batches[0][0]), steps=steps, lr=rate * 1e-3
    )
    optimizer = SIRFShampoo(model, **arguments)
    for x, y in batches[:steps]:
        optimizer.zero_grad()
        (scale * F.cross_entropy(model(x), y)).backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far two runs end from each other."""
    return float((a - b).norm() / a.norm())


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
def test_the_loss_may_be_multiplied_by_anything(scale: float) -> None:
    assert distance(trained(network()), trained(network(), scale=scale)) < 1e-9


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_so_it_may_in_float32(scale: float) -> None:
    a = trained(network(dtype=torch.float32), steps=10)
    b = trained(network(dtype=torch.float32), scale=scale, steps=10)
    assert distance(a, b) < 1e-3


def test_a_batch_may_be_repeated() -> None:
    def twice(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.repeat(2, 1, 1), y.repeat(2)

    assert distance(trained(network()), trained(network(), change=twice)) < 1e-9


def test_outputs_may_be_in_any_order() -> None:
    order = torch.tensor([3, 0, 4, 1, 2])
    model = network()
    with torch.no_grad():
        model[-1].weight.copy_(model[-1].weight[order])
        model[-1].bias.copy_(model[-1].bias[order])
    place = order.argsort()
    trained(model, change=lambda x, y: (x, place[y]))
    straight = network()
    trained(straight)
    for p, q in zip(straight.parameters(), model.parameters(), strict=True):
        q = q[place] if q.shape[0] == 5 else q
        assert torch.allclose(p, q, rtol=1e-8, atol=1e-9)


def test_layers_may_have_gradients_of_different_scales() -> None:
    moves = []
    for scale in (1.0, 1e-4):
        p = nn.Parameter(torch.ones(6, 4, dtype=torch.float64))
        optimizer = SIRFShampoo([p], **recipe(nn.Linear(4, 6), batch_size=8))
        for seed in range(5):
            draw = torch.Generator().manual_seed(seed)
            p.grad = scale * torch.randn(6, 4, generator=draw, dtype=torch.float64)
            optimizer.step()
        moves.append(p.detach() - 1)
    assert distance(*moves) < 1e-9


def change_of_activations(width: int, depth: int, steps: int = 5) -> float:
    """Return how far the last hidden layer's activations move, beside their size."""
    torch.manual_seed(0)
    blocks = [
        nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.ReLU())
        for _ in range(depth)
    ]
    first, head = nn.Linear(20, width), nn.Linear(width, 5)

    def hidden(x: Tensor) -> Tensor:
        h = first(x)
        for block in blocks:  # residual, each of an equal share
            h = h + block(h) / depth**0.5
        return h

    model = nn.ModuleList([first, *blocks, head])
    optimizer = SIRFShampoo(model.parameters(), **recipe(model, batch_size=256))
    x, y = torch.randn(256, 20), torch.randint(5, (256,))
    before = hidden(x).detach()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(head(hidden(x)), y).backward()
        optimizer.step()
    return float((hidden(x).detach() - before).norm() / before.norm())


def test_activations_change_alike_at_every_width_and_depth() -> None:
    at_width = [change_of_activations(width, depth=4) for width in (64, 256, 1024)]
    assert max(at_width) < 2 * min(at_width)
    at_depth = [change_of_activations(64, depth) for depth in (2, 8, 32)]
    assert max(at_depth) < 1.2 * min(at_depth)
