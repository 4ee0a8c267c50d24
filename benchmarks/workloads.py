"""The sets of parameters that the contestants step on, as names and shapes."""

from collections.abc import Callable
from math import prod

Shapes = dict[str, tuple[int, ...]]


def gpt(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """Return the parameters of a GPT with biases and an untied head.

    Args:
        layers: Number of transformer blocks.
        width: Size of the residual stream.
        vocabulary: Number of tokens.
        context: Number of positions.

    Returns:
        Name and shape of every parameter, in the order of the forward pass.
    """
    shapes: Shapes = {
        "token_embedding": (vocabulary, width),
        "position_embedding": (context, width),
    }
    for i in range(layers):
        shapes |= {
            f"block{i}_ln1_weight": (width,),
            f"block{i}_ln1_bias": (width,),
            f"block{i}_qkv_weight": (3 * width, width),
            f"block{i}_qkv_bias": (3 * width,),
            f"block{i}_proj_weight": (width, width),
            f"block{i}_proj_bias": (width,),
            f"block{i}_ln2_weight": (width,),
            f"block{i}_ln2_bias": (width,),
            f"block{i}_fc_weight": (4 * width, width),
            f"block{i}_fc_bias": (4 * width,),
            f"block{i}_fc2_weight": (width, 4 * width),
            f"block{i}_fc2_bias": (width,),
        }
    return shapes | {
        "ln_weight": (width,),
        "ln_bias": (width,),
        "head_weight": (vocabulary, width),
    }


def mlp(layers: int, width: int) -> Shapes:
    """Return the parameters of `layers` square linear layers with biases."""
    shapes: Shapes = {}
    for i in range(layers):
        shapes[f"layer{i}_weight"] = (width, width)
        shapes[f"layer{i}_bias"] = (width,)
    return shapes


def numbers(shapes: Shapes) -> int:
    """Count the scalars in all parameters."""
    return sum(prod(shape) for shape in shapes.values())


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "gpt256": lambda: gpt(layers=4, width=256, vocabulary=96, context=64),
    "mlp100": lambda: mlp(layers=100, width=64),
    "tiny": lambda: gpt(layers=1, width=8, vocabulary=12, context=4),
}
"""What `--workload` accepts; a new workload joins with one line."""

CONSTRUCTION: Shapes = mlp(layers=1200, width=32)
"""2,400 parameters: what the time of the constructor is measured on."""
