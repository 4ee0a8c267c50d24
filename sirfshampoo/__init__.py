"""SIRFShampoo: Shampoo with structured factors, without inverses and roots."""

from sirfshampoo._chooser import choose_structures
from sirfshampoo._interval import GrowingInterval
from sirfshampoo._plan import summary
from sirfshampoo._recipe import recipe
from sirfshampoo._summary import Summary
from sirfshampoo.combiner import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
)
from sirfshampoo.optimizer import SIRFShampoo

__all__ = [
    "FlattenEmbedding",
    "GrowingInterval",
    "LinearWeightBias",
    "PerParameter",
    "PreconditionerGroup",
    "SIRFShampoo",
    "Summary",
    "choose_structures",
    "recipe",
    "summary",
]
__version__ = "0.1.0"
