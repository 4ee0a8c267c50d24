"""Settings from what the user knows: a model, a batch size, how long it trains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch.nn import Module

from sirfshampoo._config.arguments import check_adamw, check_module
from sirfshampoo._config.checks import check_count
from sirfshampoo._config.weights import is_matrix
from sirfshampoo.combiner import FlattenKernel

__all__ = ["GrowingInterval", "recipe"]

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
        max_dense: The longest axis with a dense factor. Longer ones have dense blocks
            of 128 (of `max_dense`, if that is less), and so have those of more than 128
            that are over twice as long as the tensor's others together; those of 16
            times `max_dense` and vectors have diagonal factors.

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
    weights = sum(p.requires_grad and is_matrix(p) for p in model.parameters())
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
