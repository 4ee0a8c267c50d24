"""SIRFShampoo: Shampoo with structured factors, without inverses and roots."""

from sirfshampoo.combiner import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
)
from sirfshampoo.optimizer import SIRFShampoo

__all__ = [
    "FlattenEmbedding",
    "LinearWeightBias",
    "PerParameter",
    "PreconditionerGroup",
    "SIRFShampoo",
]
__version__ = "0.1.0"
