"""What the steps are timed on: the parameters of models of today."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.workloads import Shapes, gpt, mlp, vectors


def gpt2_small(
    layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024
) -> Shapes:
    """Return the 124 million parameters; the head is the embedding."""
    shapes = gpt(layers, width, vocabulary, context)
    return {name: s for name, s in shapes.items() if name != "head_weight"}


def llama_block(width: int, multiple: int = 256) -> Shapes:
    """Return one block: attention, a gated layer of 8/3 the width, two norms."""
    hidden = -(-8 * width // 3 // multiple) * multiple
    square = {f"{name}_weight": (width, width) for name in ("q", "k", "v", "o")}
    return {
        **square,
        "gate_weight": (hidden, width),
        "up_weight": (hidden, width),
        "down_weight": (width, hidden),
        "norm1_weight": (width,),
        "norm2_weight": (width,),
    }


WORKLOADS: dict[str, Shapes] = {
    "gpt2-small": gpt2_small(),
    "4x2048": {f"weight{i}": (2048, 2048) for i in range(4)},
    "100x64": {k: s for k, s in mlp(layers=100, width=64).items() if len(s) > 1},
    "llama-2048": llama_block(2048),
    "llama-4096": llama_block(4096),
    "vectors": vectors(number=1000, width=256),
}
"""In order of worth."""

TINY: dict[str, Shapes] = {
    "gpt2-small": gpt2_small(layers=1, width=8, vocabulary=40, context=16),
    "4x2048": {f"weight{i}": (16, 16) for i in range(4)},
    "llama-2048": llama_block(8, 4),
    "vectors": vectors(number=3, width=16),
}
"""To rehearse: what the larger ones are made of, but small."""


class Parameters(nn.Module):
    """Parameters on a device, with a gradient for each that stays where it is."""

    SCALE = 8**-0.5  # 1 / √batch size: the fixed point of the factors is near identity

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], device: str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            p = nn.Parameter(torch.randn(shape, device=device).mul_(0.02))
            p.grad = torch.empty_like(p)
            self.register_parameter(name, p)
        self.grads: list[Tensor] = [p.grad for p in self.parameters()]
        self.draw()

    def draw(self) -> None:
        """Give every parameter a fresh gradient in its place."""
        for p, g in zip(self.parameters(), self.grads, strict=True):
            p.grad = g.normal_(std=self.SCALE)
