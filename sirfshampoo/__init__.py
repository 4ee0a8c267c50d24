"""SIRFShampoo: Shampoo with structured factors, without inverses and roots."""

from sirfshampoo._report.rival import warn_of_rival
from sirfshampoo.chooser import choose_structures
from sirfshampoo.combiner import (
    FlattenEmbedding,
    FlattenKernel,
    LinearWeightBias,
    PerParameter,
    PreconditionerGroup,
)
from sirfshampoo.optimizer import SIRFShampoo
from sirfshampoo.recipe import GrowingInterval, recipe
from sirfshampoo.summary import Summary, summary

__all__ = [
    "FlattenEmbedding",
    "FlattenKernel",
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
__version__ = "1.0.0"

warn_of_rival()
