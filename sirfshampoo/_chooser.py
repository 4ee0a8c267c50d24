"""Which structures suit the parameters of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Linear, Module, Parameter

from sirfshampoo._config import check_structure

__all__ = ["choose_structures"]

_EMBEDDINGS = (Embedding, EmbeddingBag)


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
        ``SIRFShampoo(model, choose_structures(model))``. They hold every parameter that
        requires a gradient once, in the order of the model. Add other options to them
        as you like.

    Raises:
        ValueError: If an argument is wrong.
    """
    if not isinstance(model, Module):
        raise ValueError(
            f"Argument 'model' must be a torch.nn.Module, got {type(model).__name__}."
        )
    if isinstance(max_dense, bool) or not isinstance(max_dense, int) or max_dense < 0:
        raise ValueError(
            f"Argument 'max_dense' must be an integer >= 0, got {max_dense!r}."
        )
    check_structure("beyond", beyond)
    lean = _lean_parameters(model, heads)

    def choice(p: Parameter) -> tuple[str, ...]:
        """Return the structure of each axis; none if all are diagonal."""
        dims = [d for d in p.shape if d != 1]
        if len(dims) < 2 or id(p) in lean:
            return ()
        return tuple("dense" if d <= max_dense else beyond for d in dims)

    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for p, weight in _with_weights(model):
        groups.setdefault(choice(p if weight is None else weight), []).append(p)
    return [
        {
            "params": params,
            "structures": {1: "diagonal", len(axes): axes} if axes else "diagonal",
        }
        for axes, params in groups.items()
    ]


def _with_weights(model: Module) -> Iterator[tuple[Parameter, Parameter | None]]:
    """Yield every trainable parameter once; a bias with the weight of its layer."""
    seen: set[int] = set()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        matrices = [p for p in own if _axes(p) > 1]
        for p in own:
            if p.requires_grad and id(p) not in seen:
                seen.add(id(p))
                joins = len(matrices) == 1 and _axes(p) < 2
                yield p, matrices[0] if joins else None


def _axes(p: Tensor) -> int:
    """Return how many axes a tensor has, less those of size 1."""
    return sum(d != 1 for d in p.shape)


def _lean_parameters(model: Module, heads: Iterable[str] | None) -> set[int]:
    """Return the identities of the parameters of embeddings and output heads."""
    modules: list[Module] = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
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
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, _EMBEDDINGS)}
    tied: list[Module] = [layer for layer in layers if id(layer.weight) in embedded]
    return tied or list(layers[-1:])
