"""How many examples the inputs of a model hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Tensor

Count = Callable[..., int]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested inputs or outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, (tuple, list)):
        for entry in value:
            yield from tensors_in(entry)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in fields(value)])


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
    tensor = next((t for t in tensors_in(inputs) if t.ndim), None)
    if tensor is None:
        raise ValueError(
            "Cannot detect the batch size: no input of the model is a tensor with at "
            "least one axis. Pass 'batch_size' as an integer, or as a callable that "
            "maps the model's inputs to it."
        )
    return tensor.shape[0]


def takes_keywords(count: Count) -> bool:
    """Return whether a callable has a second parameter that must be given."""
    try:
        parameters = list(signature(count).parameters.values())
    except (TypeError, ValueError):  # some builtins do not tell
        return False
    positional = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    required = [
        p for p in parameters if p.default is Parameter.empty and p.kind in positional
    ]
    return len(required) == 2


def count_examples(
    count: Count,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    with_keywords: bool,
) -> int:
    """Return what a callable says of the inputs of a forward pass.

    Args:
        count: The callable.
        args: The model's positional inputs.
        kwargs: Its keyword inputs.
        with_keywords: Whether the callable takes them, too; see `takes_keywords`.

    Raises:
        ValueError: If it does not return an integer >= 0.
    """
    if count is get_batch_size:
        size = get_batch_size((*args, *kwargs.values()))
    elif with_keywords:
        size = count(args, kwargs)
    else:
        size = count(args)
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(
            "Argument 'batch_size' must return an integer >= 0 for the inputs of "
            f"the model, got {size!r}."
        )
    return size
