"""The structures a Kronecker factor can have, by name."""

import re
from functools import cache

from sirfshampoo.structures.base import StructuredMatrix
from sirfshampoo.structures.block_diagonal import Block30DiagonalMatrix, block_diagonal
from sirfshampoo.structures.dense import DenseMatrix
from sirfshampoo.structures.diagonal import DiagonalMatrix
from sirfshampoo.structures.hierarchical import Hierarchical15_15Matrix, hierarchical
from sirfshampoo.structures.toeplitz import TrilToeplitzMatrix, TriuToeplitzMatrix

__all__ = ["SUPPORTED_STRUCTURES", "StructuredMatrix", "structure_class"]

SUPPORTED_STRUCTURES: dict[str, type[StructuredMatrix]] = {
    "dense": DenseMatrix,
    "diagonal": DiagonalMatrix,
    "block30diagonal": Block30DiagonalMatrix,
    "hierarchical15_15": Hierarchical15_15Matrix,
    "triltoeplitz": TrilToeplitzMatrix,
    "triutoeplitz": TriuToeplitzMatrix,
}

# beyond six digits, torch cannot count the numbers of an empty tensor of such blocks
_SIZE = "([1-9][0-9]{0,5})"
_BLOCKS = re.compile(f"block{_SIZE}diagonal")
_HIERARCHY = re.compile(f"hierarchical{_SIZE}_{_SIZE}")


@cache
def structure_class(name: str) -> type[StructuredMatrix]:
    """Return the class of a structure; equal names have the same class.

    Args:
        name: A name in `SUPPORTED_STRUCTURES`, or one with other sizes, such as
            ``'block64diagonal'`` (blocks of 64 × 64) and ``'hierarchical8_4'`` (8 dense
            rows at the top, 4 at the bottom). Sizes go from 1 to 999999.

    Raises:
        ValueError: If no structure has this name.
    """
    if name in SUPPORTED_STRUCTURES:
        return SUPPORTED_STRUCTURES[name]
    if blocks := _BLOCKS.fullmatch(name):
        return block_diagonal(int(blocks[1]))
    if hierarchy := _HIERARCHY.fullmatch(name):
        return hierarchical(int(hierarchy[1]), int(hierarchy[2]))
    raise ValueError(
        f"A structure must be one of {list(SUPPORTED_STRUCTURES)}, or, with other "
        "sizes from 1 to 999999, 'block<size>diagonal' or "
        f"'hierarchical<top>_<bottom>', got {name!r}."
    )
