"""What the checks share: a model of odd shapes, its gradients, how a check is told."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4
# large enough that parameters and factors visibly move within a few steps
FAST: dict[str, Any] = {"lr": 0.05, "beta2": 0.2, "lam": 0.01, "batch_size": BATCH}
STRUCTURES = (
    "dense",
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
)
TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# no axis and 1 to 4; odd ones; three that share a stack; a single entry
SHAPES = [(), (1,), (61,), (33, 61), (5, 7), (5, 7), (5, 7), (4, 3, 5), (6, 3, 3, 3)]
LARGE = [(256, 192), (256, 192), (130, 70)]


def mixture(first: int) -> dict[int, tuple[str, ...]]:
    """Give consecutive axes consecutive structures, from `first` on."""
    return {
        axes: tuple(STRUCTURES[(first + n) % len(STRUCTURES)] for n in range(axes))
        for axes in range(1, 5)
    }


@dataclass(frozen=True)
class Check:
    """One thing that must be right.

    Attributes:
        name: What is right then.
        run: Raises if it is not; may return a remark.
        of_gpus: Whether it says something on a GPU only. Elsewhere it runs, too, to
            find what would stop it there, but does not count.
    """

    name: str
    run: Callable[[], Any]
    of_gpus: bool = False


class Parameters(nn.Module):
    """Parameters without a net: gradients are set by hand."""

    def __init__(self, shapes: list, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        tensors = [torch.randn(shape, generator=draw) for shape in shapes]
        self.tensors = nn.ParameterList(t.to(device, dtype) for t in tensors)


def draw_gradients(model: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    """Write gradients to where they were; return copies."""
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        G = torch.randn(p.shape, generator=draw).to(p.device, p.dtype)
        if p.grad is None:
            p.grad = G
        else:
            p.grad.copy_(G)
    return {p: p.grad.clone() for p in model.parameters() if p.grad is not None}


def flat(model: nn.Module) -> Tensor:
    """Return all parameters in a row, on the CPU, in float64."""
    parts = [p.detach().flatten().double().cpu() for p in model.parameters()]
    return torch.cat(parts)


def equal(a: Tensor, b: Tensor, tolerance: float = 0.0) -> str:
    """Hold numbers against each other, to the bit by default; return how far they are.

    Raises:
        AssertionError: If they are too far.
    """
    error = float((a - b).abs().max())
    if not error <= tolerance:  # NaN is too far
        raise AssertionError(f"off by {error:.2e}, granted are {tolerance:.0e}")
    return f"off by {error:.1e}"


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Have every wait of the host for the device raise an error."""
    if device == "cpu":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
