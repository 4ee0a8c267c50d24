"""Fits what the docstrings and signatures say to what Sphinx reads."""

import sys
from typing import Any, get_type_hints

from sphinx.application import Sphinx
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

import sirfshampoo
from sirfshampoo.combiner import PreconditionerGroup

PUBLIC_BASES = {
    "UnitOptimizer": Optimizer,
    "FlattenAndConcatenate": PreconditionerGroup,
}
"""What stands in the place of a base class that is not public."""


def know_types() -> None:
    """Give the names that modules import for type checkers alone to all readers."""
    module = sys.modules[sirfshampoo.SIRFShampoo.__module__]
    module.ProcessGroup, module.DeviceMesh = ProcessGroup, DeviceMesh
    for name in sirfshampoo.__all__:  # of classes, Sphinx would read strings
        value = getattr(sirfshampoo, name)
        if isinstance(value, type) and "__init__" in vars(value):
            value.__init__.__annotations__ = get_type_hints(value.__init__)


def show_bases(app: Sphinx, name: str, obj: Any, options: Any, bases: list) -> None:
    """Name the public base of a class."""
    bases[:] = [PUBLIC_BASES.get(base.__name__, base) for base in bases]


def keep_returns(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Say that what comes before a colon is no type: these stand in signatures."""
    for i, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:" and ":" in lines[i + 1]:
            text = lines[i + 1]
            indent = len(text) - len(text.lstrip())
            lines[i + 1] = f"{text[:indent]}: {text.lstrip()}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Listen before napoleon does."""
    know_types()
    app.connect("autodoc-process-bases", show_bases)
    app.connect("autodoc-process-docstring", keep_returns, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
