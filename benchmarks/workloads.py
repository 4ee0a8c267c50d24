"""The sets of parameters that the contestants step on, as names and shapes."""

from collections import Counter
from collections.abc import Callable
from math import prod

Shapes = dict[str, tuple[int, ...]]

MOST_NUMBERS = 2**24  # in the operand of a batched product: 64 MiB in float32


def gpt(layers: int, width: int, vocabulary: int, context: int) -> Shapes:
    """Return the parameters of a GPT with biases and an untied head, in order."""
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


def vectors(number: int, width: int) -> Shapes:
    """Return many vectors of one length."""
    return {f"vector{i}": (width,) for i in range(number)}


def numbers(shapes: Shapes) -> int:
    """Count the scalars in all parameters."""
    return sum(prod(shape) for shape in shapes.values())


def largest_products(shapes: Shapes, most: int = 3) -> list[tuple[int, int, int]]:
    """Return the matrix products that dense factors mostly consist of.

    Axis n of a tensor has a factor of d rows, which is multiplied with the tensor as a
    matrix of d rows. Vectors count only where there is nothing else, because they are
    the ones that have other factors.

    Args:
        shapes: The parameters.
        most: How many to return at most.

    Returns:
        Number of equal products in a step (as many as fit into `MOST_NUMBERS` at
        once), d, and columns of the tensor as a matrix; the costliest first.
    """
    tensors = [shape for shape in shapes.values() if len(shape) > 1]
    if not tensors:  # of a vector's factor, KᵀK costs most
        tensors = [shape * 2 for shape in shapes.values()]
    found = Counter((d, prod(shape) // d) for shape in tensors for d in shape)
    costly = sorted(found, key=lambda x: found[x] * x[0] ** 2 * x[1], reverse=True)
    return [
        (max(1, min(found[d, n], MOST_NUMBERS // (d * max(d, n)))), d, n)
        for d, n in costly[:most]
    ]


WORKLOADS: dict[str, Callable[[], Shapes]] = {
    "gpt64": lambda: gpt(layers=4, width=64, vocabulary=96, context=64),
    "gpt256": lambda: gpt(layers=4, width=256, vocabulary=96, context=64),
    "gpt768": lambda: gpt(layers=4, width=768, vocabulary=96, context=64),
    "mlp100": lambda: mlp(layers=100, width=64),
    "matrix2048": lambda: {"weight": (2048, 2048)},
    "matrix4096": lambda: {"weight": (4096, 1024)},
    "vectors": lambda: vectors(number=1000, width=256),
    "tiny": lambda: gpt(layers=1, width=8, vocabulary=12, context=4),
}
"""What `--workload` accepts; a new workload joins with one line."""

CONSTRUCTION: Shapes = mlp(layers=1200, width=32)
"""2,400 parameters: what the time of the constructor is measured on."""

GROWTH: dict[str, dict[int, Shapes]] = {
    "layers": {n: mlp(layers=n, width=64) for n in (1, 2, 4, 8, 16, 32, 64)},
    "width": {n: mlp(layers=4, width=n) for n in (64, 128, 256, 512)},
}
"""How `--scaling` grows a network: its layers of width 64, the width of 4 layers."""
