"""Settings that train well without a search, from what one gives AdamW."""

from __future__ import annotations

from typing import Any

from torch.nn import Module, Parameter

from sirfshampoo._config import check_adamw, check_count
from sirfshampoo._interval import GrowingInterval

__all__ = ["recipe"]

#: The learning rate is this, times AdamW's, times √(batch size) / ∜(parameters).
_RATE = 4.0

#: lr · U has at most this Frobenius norm, in units of AdamW's learning rate, in runs of
#: up to so many steps (of longer ones less, see below); matrices with more than so many
#: entries have the root mean square that it makes for these.
_LONGEST, _STEPS_AT_LONGEST, _ENTRIES_AT_LONGEST = 430.0, 400, 8192

#: The steps of a run that nobody tells.
_USUAL_STEPS = 1000

#: Weights shrink by the first in a step, or by the second over all, if that is less.
_SHRINK, _SHRINK_OVERALL = 0.015, 5.0


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
            The learning rate depends on it.
        steps: How many steps training takes: the longest step and the weight decay
            follow from it.
        lr: AdamW's learning rate, to which the recipe's own is proportional. Leave it
            at 1e-3, with which all was measured, whatever a search of AdamW finds: at
            four times that, runs are lost.
        betas: AdamW's; the first becomes the momentum, the second has no counterpart.
        weight_decay: Weights shrink by lr · weight_decay in a step, as AdamW's.
            Default: by 0.015 at the full learning rate, or by 5 / `steps` if that is
            less; not at all without `steps`. This is a `weight_decay` of 15, or of
            5000 / `steps`: what is usual for AdamW, 0.01 to 0.1, is next to nothing
            here. Vectors such as biases never shrink.
        max_dense: The longest axis with a dense factor; longer ones, and vectors, have
            diagonal factors.

    Returns:
        Keyword arguments. Change or add what you like before you pass them on; but
        `kappa` and `structures` stand in the groups of ``params``, and win there, and
        a rule of `combine_params` joins only what is in one group.

    Raises:
        ValueError: If an argument is wrong.
    """
    if not isinstance(model, Module):
        raise ValueError(
            f"Argument 'model' must be a torch.nn.Module, got {type(model).__name__}."
        )
    check_count("batch_size", batch_size)
    check_count("max_dense", max_dense)
    if steps is not None:
        check_count("steps", steps)
    check_adamw(lr=lr, betas=betas, weight_decay=weight_decay)
    params = [p for p in model.parameters() if p.requires_grad]
    size = max(sum(p.numel() for p in params), 1)
    # with the inverse in place of its power ¾, U would have the length √(size / B) in
    # the metric that it inverts; with the square root, entries of about 1 / √B
    own = _RATE * lr * batch_size**0.5 / size**0.25
    shrink = 0.0
    if weight_decay is not None:
        shrink = lr * weight_decay
    elif steps is not None:
        shrink = min(_SHRINK, _SHRINK_OVERALL / steps)
    # steps that go anywhere add up as the root of their number
    ratio = min(_STEPS_AT_LONGEST / (steps or _USUAL_STEPS), 1.0)
    longest = _LONGEST * lr / own * ratio**0.5
    return {
        "params": _groups(params, max_dense, shrink / own if shrink else 0.0),
        "lr": own,
        "beta2": 0.3,
        "alpha1": float(betas[0]),
        "alpha2": 0.0,
        "lam": 1e-6,
        "T": GrowingInterval(10),
        "initial_factors": "gradient",
        "exponent": 0.75,
        "momentum_first": True,
        "nesterov": True,
        "max_update_norm": longest,
        "max_update_rms": longest / _ENTRIES_AT_LONGEST**0.5,
        "cautious_decay": True,
    }


def _groups(
    params: list[Parameter], max_dense: int, kappa: float
) -> list[dict[str, Any]]:
    """Return parameter groups of equal structures; vectors without weight decay."""
    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for p in params:
        dims = [d for d in p.shape if d != 1] or [1]
        axes = tuple("dense" if d <= max_dense else "diagonal" for d in dims)
        groups.setdefault(axes if len(dims) > 1 else ("diagonal",), []).append(p)
    return [
        {
            "params": members,
            "structures": {len(axes): axes},
            "kappa": kappa if len(axes) > 1 else 0.0,
        }
        for axes, members in groups.items()
    ]
