"""The structures a Kronecker factor can have, by name."""

from sirfshampoo.structures.base import StructuredMatrix
from sirfshampoo.structures.block_diagonal import Block30DiagonalMatrix
from sirfshampoo.structures.dense import DenseMatrix
from sirfshampoo.structures.diagonal import DiagonalMatrix
from sirfshampoo.structures.hierarchical import Hierarchical15_15Matrix
from sirfshampoo.structures.toeplitz import TrilToeplitzMatrix, TriuToeplitzMatrix

__all__ = ["SUPPORTED_STRUCTURES", "StructuredMatrix"]

SUPPORTED_STRUCTURES: dict[str, type[StructuredMatrix]] = {
    "dense": DenseMatrix,
    "diagonal": DiagonalMatrix,
    "block30diagonal": Block30DiagonalMatrix,
    "hierarchical15_15": Hierarchical15_15Matrix,
    "triltoeplitz": TrilToeplitzMatrix,
    "triutoeplitz": TriuToeplitzMatrix,
}
