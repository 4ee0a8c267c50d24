"""How many examples the inputs of a model hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from inspect import Parameter, signature
from typing import Any

from torch import Size, Tensor
from torch.nn import Module
from torch.nn.utils.rnn import PackedSequence

Count = Callable[..., int]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested inputs or outputs."""
    if isinstance(value, Tensor):
        yield value
        return
    for entry in _parts(value):
        yield from tensors_in(entry)


def get_batch_size(inputs: tuple[Tensor, ...]) -> int:
    """Return the batch size: the leading dimension of the first input tensor.

    What tells its number of examples itself is believed: a ``PackedSequence`` of its
    sequences, an object by an integer ``num_graphs`` or ``batch_size``. Lists of images
    or of sequences, which share no batch axis, count their entries.

    Args:
        inputs: The inputs to the neural network's ``forward``. Tuples, lists, dicts and
            objects are searched for the first tensor that has an axis.

    Returns:
        The number of examples.

    Raises:
        ValueError: If there is no such tensor.
    """
    size = _examples_in(inputs)
    if size is None:
        raise ValueError(
            "Cannot detect the batch size: no input of the model is a tensor with at "
            "least one axis. Pass 'batch_size' as an integer, or as a callable that "
            "maps the model's inputs to it."
        )
    return size


def _examples_in(value: Any) -> int | None:
    """Return how many examples the first input that tells so holds, or None."""
    if isinstance(value, Tensor):
        return value.size(0) if value.ndim else None
    if isinstance(value, PackedSequence):
        return int(value.batch_sizes[0])  # the sequences that have a first element
    for name in ("num_graphs", "batch_size"):  # batches of graphs, tensordict
        try:
            told = getattr(value, name, None)
        except Exception:  # of an object that finds its attributes itself
            continue
        told = told[0] if isinstance(told, Size) and told else told
        if isinstance(told, int) and not isinstance(told, bool):
            return told
    if isinstance(value, list) and _is_list_of_examples(value):
        return len(value)
    found = map(_examples_in, _parts(value))
    return next((size for size in found if size is not None), None)


def _is_list_of_examples(entries: list[Any]) -> bool:
    """Return whether tensors are examples each, and not inputs of one batch.

    So it is with images ``[channels, height, width]``, and with tensors whose leading
    axes differ, such as sequences.
    """
    if not entries or not all(isinstance(t, Tensor) and t.ndim for t in entries):
        return False
    if len({t.ndim for t in entries}) > 1:
        return False
    channels, *rest = entries[0].shape
    if len(rest) == 2 and channels in (1, 3, 4):
        return all(min(t.shape[1:]) > len(t) == channels for t in entries)
    return len({len(t) for t in entries}) > 1


def _parts(value: Any) -> Iterable[Any]:
    """Return what a container or an object holds."""
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (tuple, list)):
        return value
    if isinstance(value, (type, Module)) or callable(value):
        return ()
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    # no objects within objects: these may hold each other
    entries = getattr(value, "__dict__", {}).values()
    return [v for v in entries if isinstance(v, (Tensor, Mapping, tuple, list))]


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
