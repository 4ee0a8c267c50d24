"""Settings that train well without a search, from what one gives AdamW."""

from __future__ import annotations

from typing import Any

from torch.nn import Module, Parameter

from sirfshampoo._interval import GrowingInterval

__all__ = ["recipe"]

#: The learning rate is this, times AdamW's, times √(batch size / parameters).
_RATE = 10.0


def recipe(
    model: Module,
    *,
    batch_size: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    max_dense: int = 1024,
) -> dict[str, Any]:
    """Return arguments of `SIRFShampoo` for a model that AdamW has trained so far.

    Use them as ``SIRFShampoo(model, **recipe(model, batch_size=128))``, with a warm-up
    over a tenth of the steps and a decay, as for AdamW. ``docs/from_adamw.md`` tells
    where each value comes from, what was measured, and where it falls short.

    Args:
        model: The neural network.
        batch_size: The number of examples that the loss averages over in a step. (The
            optimizer counts them itself; the learning rate depends on them.)
        lr: AdamW's learning rate. Only its ratio to 1e-3 matters, with which all was
            measured; leave it, unless AdamW is known to want another.
        betas: AdamW's; the first becomes the momentum, the second has no counterpart.
        weight_decay: AdamW's. Weights shrink by as much in a step.
        max_dense: The longest axis with a dense factor; longer ones, and vectors, have
            diagonal factors.

    Returns:
        Keyword arguments. Change or add what you like before you pass them on.

    Raises:
        ValueError: If an argument is wrong.
    """
    whole = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if not whole or batch_size < 1:
        raise ValueError(
            f"Argument 'batch_size' must be an integer > 0, got {batch_size!r}."
        )
    if not lr > 0:
        raise ValueError(f"Argument 'lr' must be a number > 0, got {lr!r}.")
    params = [p for p in model.parameters() if p.requires_grad]
    size = max(sum(p.numel() for p in params), 1)
    # U = F⁻¹ G has the length √(size / B) in the metric of the Fisher matrix F: this
    # lr makes steps equally long in it, whatever the model and the batch
    own = _RATE * lr * (batch_size / size) ** 0.5
    return {
        "params": _groups(params, max_dense),
        "lr": own,
        "beta2": 0.2,
        "alpha1": betas[0],
        "alpha2": 0.5,
        "lam": 1e-6,
        "kappa": weight_decay * lr / own,
        "T": GrowingInterval(10),
        "initial_factors": "gradient",
        "momentum_first": True,
        "max_update_rms": 0.003,
    }


def _groups(params: list[Parameter], max_dense: int) -> list[dict[str, Any]]:
    """Return parameter groups of equal structures."""
    groups: dict[tuple[str, ...], list[Parameter]] = {}
    for p in params:
        dims = [d for d in p.shape if d != 1] or [1]
        axes = tuple("dense" if d <= max_dense else "diagonal" for d in dims)
        groups.setdefault(axes if len(dims) > 1 else ("diagonal",), []).append(p)
    return [
        {"params": members, "structures": {len(axes): axes}}
        for axes, members in groups.items()
    ]
