"""What runs where: numbers that the host may look at, code that is not traced."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def is_at_hand(tensor: Tensor) -> bool:
    """Return whether looking at a number of the tensor costs no wait.

    So it is on a CPU. An accelerator works behind the host, which may not ask for
    numbers: a step that did would wait, and could not be captured as a CUDA graph.
    Nor may what `torch.compile` traces: it would fall into pieces there.
    """
    return tensor.is_cpu and not torch.compiler.is_compiling()


def is_exporting() -> bool:
    """Return whether `torch.export` looks at a model."""
    # not `is_exporting`, which is always true in what older `torch.compile` traces
    return getattr(torch.compiler, "_is_exporting_flag", False)


def untraced(function: Callable[P, R]) -> Callable[P, R]:
    """Have `torch.compile` leave a function to Python, with all that it calls.

    For what decides, counts and warns; traced, each outcome would be a reason to
    compile anew.
    """
    disabled: Callable[P, R] | None = None

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:  # not before: it imports the compiler, which takes long
            disabled = torch.compiler.disable(function)
        return disabled(*args, **kwargs)

    return call
