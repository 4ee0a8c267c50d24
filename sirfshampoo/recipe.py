"""Settings from what the user knows: a model, a batch size, how long it trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from torch import Tensor
from torch.nn import Linear, Module, Parameter

from sirfshampoo._config.arguments import check_adamw, check_module
from sirfshampoo._config.axes import check_structure
from sirfshampoo._config.checks import check_count
from sirfshampoo._config.weights import EMBEDDINGS, embedded, weight_of
from sirfshampoo.combiner import FlattenKernel

__all__ = ["GrowingInterval", "choose_structures", "recipe"]

#: The learning rate is so many times AdamW's over the root of the number L of weights:
#: a step has the size of a matrix with orthonormal rows, whatever the loss, the batch
#: and the width, and the steps of L weights add up like √L.
_RATE = 250.0

#: No parameter moves by more in a step, relative to its size: by the first; in a short
#: run by the second over all, so that it may grow tenfold; but never by the third.
_LONGEST, _LONGEST_OVERALL, _LONGEST_OF_ALL = 0.03, 5.0, 0.1

#: Tensors have at most so many axes.
_AXES = range(2, 9)

#: Weights shrink by the first in a step, or by the second over all, if that is less.
_SHRINK, _SHRINK_OVERALL = 0.03, 3.0


def recipe(
    model: Module,
    *,
    batch_size: int,
    steps: int | None = None,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float | None = None,
    max_dense: int = 1024,
) -> dict[str, Any]:
    """Return arguments of `SIRFShampoo` for a model that AdamW has trained so far.

    Use them as ``SIRFShampoo(model, **recipe(model, batch_size=128, steps=10_000))``,
    with a warm-up over a tenth of the steps and a decay, as for AdamW.
    ``docs/from_adamw.md`` tells where each value comes from, what was measured, and
    where it falls short.

    Args:
        model: The neural network.
        batch_size: The number of examples in a step, as the optimizer counts them: the
            length of the inputs' leading axis. Of text that is sequences, not tokens.
            No setting depends on it; a step warns if others are counted.
        steps: How many steps training takes: the weight decay follows from it and, in
            runs of fewer than 167, how far a step may go beside the parameter.
        lr: AdamW's learning rate. The recipe's own is 250 · lr / √L, where L counts the
            weights that are trained: the parameters with more than one axis, of which
            axes of size 1 do not count. Leave it at 1e-3, with which all was measured,
            whatever a search of AdamW finds; divide it by four to fine-tune on little
            data.
        betas: AdamW's; the first becomes the momentum, the second has no counterpart.
        weight_decay: Weights shrink by lr · weight_decay in a step, as AdamW's.
            Default: by 3 / `steps` at the full learning rate, or by 0.03 if that is
            less; not at all without `steps`. With an `lr` of 1e-3, this is a
            `weight_decay` of 3000 / `steps`: what is usual for AdamW, 0.01 to 0.1, is
            less in runs of fewer than 30,000 steps. Vectors such as biases never
            shrink.
        max_dense: The longest axis with a dense factor; longer ones have block-diagonal
            factors, those of 16 times that length and vectors diagonal ones.

    Returns:
        Keyword arguments. Change or add what you like before you pass them on.

    Raises:
        ValueError: If an argument is wrong.

    Example:
        >>> model = torch.nn.Linear(64, 10)
        >>> arguments = recipe(model, batch_size=128, steps=10_000)
        >>> optimizer = SIRFShampoo(model, **{**arguments, "alpha1": 0.95})
    """
    check_module(model)
    check_count("batch_size", batch_size)
    check_count("max_dense", max_dense)
    if steps is not None:
        check_count("steps", steps)
    check_adamw(lr=lr, betas=betas, weight_decay=weight_decay)
    weights = sum(p.requires_grad and _axes(p) > 1 for p in model.parameters())
    own = _RATE * lr / max(weights, 1) ** 0.5
    longest = _LONGEST
    if steps is not None:
        longest = min(max(_LONGEST_OVERALL / steps, longest), _LONGEST_OF_ALL)
    shrink = 0.0
    if weight_decay is not None:
        shrink = lr * weight_decay
    elif steps is not None:
        shrink = min(_SHRINK, _SHRINK_OVERALL / steps)
    return {
        "lr": own,
        "beta2": 0.45,
        "alpha1": float(betas[0]),
        "alpha2": 0.5,
        "lam": 1e-4,
        "kappa": shrink / own,
        "T": GrowingInterval(10),
        "structures": {1: "diagonal"} | dict.fromkeys(_AXES, f"dense{max_dense}"),
        "combine_params": (FlattenKernel(),),
        "initial_factors": "gradient",
        "exponent": 0.5,
        "momentum_first": True,
        "nesterov": True,
        "normalize_update": True,
        "max_relative_update": longest,
        "clamp": "spectral",
        "relative_damping": True,
        "cautious_decay": True,
        "decay_vectors": False,
        "expected_batch_size": batch_size,
    }


@dataclass(frozen=True)
class GrowingInterval:
    """A ``T`` that grows with the step: min(max(⌊√step / 2⌋, 1), T).

    Factors have the most to learn at the start. With ``SIRFShampoo(...,
    T=GrowingInterval(10))`` they are updated in each of the first 17 steps, then in
    every second, from step 36 on in every third, from step 400 on in every tenth. It
    answers from the step alone, so that training resumes exactly.

    In the first 400 steps, `GrowingInterval(10)` makes 88 updates.

    Attributes:
        T: The longest interval.

    Raises:
        ValueError: If `T` is not an integer > 0.

    Example:
        >>> T = GrowingInterval(10)
        >>> [step for step in range(1000, 1030) if T(step)]
        [1001, 1011, 1021]
    """

    T: int

    def __post_init__(self) -> None:
        """Check the argument."""
        check_count("T", self.T)

    def __call__(self, step: int) -> bool:
        """Return whether the factors are to be updated in a step (from 0)."""
        return _is_due(self.T, step)


@lru_cache(maxsize=16)  # each of many groups asks
def _is_due(T: int, step: int) -> bool:
    """Return whether factors are updated in a step of a growing interval."""
    start = 0  # the first update at this interval
    for interval in range(1, T):
        grows_at = 4 * (interval + 1) ** 2
        if step < grows_at:
            return step >= start and (step - start) % interval == 0
        # the first update from there on
        start += -((start - grows_at) // interval) * interval
    return step >= start and (step - start) % T == 0


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
        if _axes(p) < 2 or id(p) in lean:
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
        matrices = [p for p in own if _axes(p) > 1]
        for p in own:
            trainable = p.requires_grad or p.is_floating_point()
            if trainable and id(p) not in seen:
                seen.add(id(p))
                joins = len(matrices) == 1 and _axes(p) < 2
                yield p, matrices[0] if joins else None


def _axes(p: Tensor) -> int:
    """Return how many axes a tensor has, less those of size 1."""
    return sum(d != 1 for d in p.shape)


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
