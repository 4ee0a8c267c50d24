"""The weights of modules: where they are, and what counts as one."""

from __future__ import annotations

from torch import Tensor
from torch.nn import Embedding, EmbeddingBag, Module, Parameter

#: Modules whose weight is a table of outputs, and no weight of inputs.
EMBEDDINGS = (Embedding, EmbeddingBag)

#: Where pruning and the older norms put the weight that is trained.
_NAMES = ("weight", "weight_orig", "weight_v")


def is_matrix(p: Tensor) -> bool:
    """Return whether a parameter has several axes; those of size 1 do not count."""
    return sum(d != 1 for d in p.shape) > 1


def weight_of(module: Module) -> Parameter | None:
    """Return the weight that is trained, from which that which is used may follow.

    The attribute ``weight`` is not asked for: where parametrized, it is computed anew
    at each look, which may change buffers.
    """
    found = [module._parameters.get(name) for name in _NAMES]
    parametrized = module._modules.get("parametrizations")
    if parametrized is not None and "weight" in parametrized._modules:
        holder = parametrized._modules["weight"]
        own = {} if holder is None else holder._parameters
        # of weight norm's two, the second has the shape of the weight
        found += [own.get("original"), own.get("original1")]
    return next((weight for weight in found if weight is not None), None)


def embedded(model: Module) -> set[int]:
    """Return the identities of the weights that embeddings look up."""
    tables = [weight_of(m) for m in model.modules() if isinstance(m, EMBEDDINGS)]
    return {id(table) for table in tables if table is not None}
