"""How many examples the gradients average over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

BatchSize = int | Callable[[tuple[Tensor, ...]], int]


def _first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor with at least one axis in nested inputs."""
    if isinstance(value, Tensor):
        return value if value.ndim else None
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return None
    found: Iterable[Tensor | None] = map(_first_tensor, value)
    return next((tensor for tensor in found if tensor is not None), None)


def get_batch_size(inputs: tuple[Tensor, ...]) -> int:
    """Return the batch size: the leading dimension of the first input tensor.

    Args:
        inputs: The inputs to the neural network's ``forward``. Tuples, lists and
            dicts are searched for the first tensor that has an axis.

    Returns:
        The size of that tensor's first axis.

    Raises:
        ValueError: If there is no such tensor.
    """
    tensor = _first_tensor(inputs)
    if tensor is None:
        raise ValueError(
            "Cannot detect the batch size: no input of the model is a tensor with at "
            "least one axis. Pass 'batch_size' as an integer, or as a callable that "
            "maps the model's inputs to it."
        )
    return tensor.shape[0]


class BatchSizeCounter:
    """Counts the examples whose gradients accumulate between two optimizer steps.

    With a callable it is a forward pre-hook of the model; with an integer it always
    returns that.

    Attributes:
        value: The number of examples counted so far, or at the last step.
    """

    def __init__(self, batch_size: BatchSize) -> None:
        self._count: Callable[[tuple[Tensor, ...]], int] | None = None
        self.value = 0
        if callable(batch_size):
            self._count = batch_size
        else:
            self.value = batch_size
        self._used = True  # whether a step has consumed `value`

    @property
    def is_hook(self) -> bool:
        """Whether the model's forward passes have to be watched."""
        return self._count is not None

    def __call__(
        self, module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Count the examples of a forward pass that gradients can come from."""
        if self._count is None or not module.training or not torch.is_grad_enabled():
            return
        inputs = (*args, *kwargs.values()) if self._count is get_batch_size else args
        size = self._count(inputs)
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(
                "Argument 'batch_size' must return an integer >= 0 for the inputs of "
                f"the model, got {size!r}."
            )
        self.value = size if self._used else self.value + size
        self._used = False

    def read(self) -> int:
        """Return the batch size of the present gradients.

        Raises:
            RuntimeError: If nothing was counted since the last step.
        """
        if self._count is not None and (self._used or self.value == 0):
            raise RuntimeError(
                "No examples were counted since the last step, so the batch size is "
                "unknown. Forward passes count if the model given to the optimizer "
                "is called itself, in training mode and with gradients enabled. "
                "Otherwise, pass 'batch_size' as an integer."
            )
        return self.value

    def close(self) -> None:
        """Note that a step has used the count: the next forward pass starts anew."""
        self._used = True
