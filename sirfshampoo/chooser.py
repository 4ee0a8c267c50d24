"""Which structures suit the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from torch.nn import Linear, Module, Parameter

from sirfshampoo._config.arguments import check_module
from sirfshampoo._config.axes import check_structure
from sirfshampoo._config.weights import EMBEDDINGS, embedded, is_matrix, weight_of

__all__ = ["choose_structures"]


def choose_structures(
    model: Module,
    *,
    max_dense: int = 2048,
    beyond: str = "block30diagonal",
    heads: Iterable[str] | None = None,
) -> list[dict[str, Any]]:
    """Choose the structures of the Kronecker factors for the parameters of a model.

    - Embeddings and output heads are ``'diagonal'``: one axis is the vocabulary or the
      classes, and a row's gradient is zero whenever its token is absent.
    - Norms, biases and all that has one axis (axes of size 1 do not count) are
      ``'diagonal'``: a dense factor of a vector learns from a matrix of rank one.
    - In all other tensors (matrices, convolution weights), axes up to ``max_dense`` are
      ``'dense'``, where the pre-conditioner learns most. Memory grows with the square
      of the axis, the time of an update with its cube, hence longer axes are `beyond`.

    A bias joins the group of its layer's weight, so that rules such as
    ``LinearWeightBias`` find both in one group.

    Args:
        model: The neural network.
        max_dense: The longest axis that gets a dense factor.
        beyond: The structure of longer axes, such as ``'block30diagonal'`` (neighbours
            belong together) or ``'diagonal'`` (cheapest).
        heads: The names of the output heads, as in ``model.named_modules()``; ``()`` if
            there are none. Default: what ``model.get_output_embeddings()`` returns; or
            linear layers whose weight is tied to an embedding; or the last linear layer
            of the model.

    Returns:
        Parameter groups with the keys ``'params'`` and ``'structures'``, for
        ``SIRFShampoo(model, choose_structures(model))``. They hold every parameter
        once, in the order of the model: what is frozen rests until it is thawed. Add
        other options to them as you like.

    Raises:
        ValueError: If an argument is wrong.

    Example:
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Embedding(5000, 64), torch.nn.Linear(64, 64)
        ... )
        >>> for group in choose_structures(model, heads=()):
        ...     print([tuple(p.shape) for p in group["params"]], group["structures"])
        [(5000, 64)] diagonal
        [(64, 64), (64,)] {1: 'diagonal', 2: ('dense', 'dense')}
    """
    check_module(model)
    if isinstance(max_dense, bool) or not isinstance(max_dense, int) or max_dense < 0:
        raise ValueError(
            f"Argument 'max_dense' must be an integer >= 0, got {max_dense!r}."
        )
    check_structure("beyond", beyond)
    lean = _lean_parameters(model, heads)

    def choice(p: Parameter) -> frozenset[tuple[str, ...]]:
        """Return the structures of the axes, of a kernel also of one with flat pixels.

        Empty if all are diagonal.
        """
        if not is_matrix(p) or id(p) in lean:
            return frozenset()
        dims_of = [list(p.shape), [*p.shape[:2], prod(p.shape[2:])]]
        structures = [
            tuple("dense" if d <= max_dense else beyond for d in dims if d != 1)
            for dims in dims_of
        ]
        return frozenset(axes for axes in structures if len(axes) > 1)

    groups: dict[frozenset[tuple[str, ...]], list[Parameter]] = {}
    for p, weight in _with_weights(model):
        groups.setdefault(choice(p if weight is None else weight), []).append(p)
    return [
        {
            "params": params,
            "structures": {1: "diagonal"} | {len(axes): axes for axes in found}
            if found
            else "diagonal",
        }
        for found, params in groups.items()
    ]


def _with_weights(model: Module) -> Iterator[tuple[Parameter, Parameter | None]]:
    """Yield every parameter once; a bias with the weight of its layer."""
    seen: set[int] = set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        matrices = [p for p in own if is_matrix(p)]
        for p in own:
            trainable = p.requires_grad or p.is_floating_point()
            if trainable and id(p) not in seen:
                seen.add(id(p))
                joins = len(matrices) == 1 and not is_matrix(p)
                yield p, matrices[0] if joins else None


def _lean_parameters(model: Module, heads: Iterable[str] | None) -> set[int]:
    """Return the identities of the parameters of embeddings and output heads."""
    modules: list[Module] = [m for m in model.modules() if isinstance(m, EMBEDDINGS)]
    modules += _named(model, heads) if heads is not None else _find_heads(model)
    return {id(p) for module in modules for p in module.parameters()}


def _named(model: Module, names: Iterable[str]) -> list[Module]:
    """Return the modules of these names."""
    known = dict(model.named_modules())
    names = [names] if isinstance(names, str) else list(names)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            "Argument 'heads' must hold names of modules in the model, got "
            f"{unknown!r}."
        )
    return [known[name] for name in names]


def _find_heads(model: Module) -> list[Module]:
    """Return the output heads of a model, as far as one can tell."""
    known = getattr(model, "get_output_embeddings", None)  # as in Hugging Face models
    head = known() if callable(known) else None
    if isinstance(head, Module):
        return [head]
    layers = [m for m in model.modules() if isinstance(m, Linear)]
    tables = embedded(model)
    tied: list[Module] = [layer for layer in layers if id(weight_of(layer)) in tables]
    return tied or list(layers[-1:])
