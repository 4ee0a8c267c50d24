"""What transforms of `torch.func` make of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def is_transforming() -> bool:
    """Return whether transforms of `torch.func` are at work."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def reaches_parameters(output: Tensor) -> bool:
    """Return whether gradients flow on from an output, beneath all transforms."""
    while _is_transformed(output):
        output = torch._C._functorch.get_unwrapped(output)
    return output.grad_fn is not None


def _is_transformed(tensor: Tensor) -> bool:
    """Return whether a transform of `torch.func` is at work on a tensor."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_vmapped(tensor: Tensor) -> bool:
    """Return whether a tensor hides an axis that `torch.func.vmap` goes along."""
    while _is_transformed(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False
