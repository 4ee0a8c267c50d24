"""Builds the optimizer that a contestant's plain data describes.

It runs in a worker's process, where only some of the packages can be imported: each
is imported when it is asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

BATCH_SIZE = 8
LR = 1e-3


class Together:
    """Several optimizers that share a model and step one after the other."""

    def __init__(self, *optimizers: Optimizer) -> None:
        """Keep the optimizers."""
        self.optimizers = optimizers

    def step(self) -> None:
        """Let each take a step."""
        for optimizer in self.optimizers:
            optimizer.step()


Built = Optimizer | Together


def sirfshampoo_options(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `SIRFShampoo`, and of `summary`, but the model."""
    structures = spec["structures"]
    if isinstance(structures, dict):  # JSON has no integer keys
        structures = {int(ndim): name for ndim, name in structures.items()}
    return {
        "T": spec["T"],
        "batch_size": BATCH_SIZE,
        "structures": structures,
        "preconditioner_dtypes": getattr(torch, spec["dtype"]),
    }


def _sirfshampoo(
    model: nn.Module, spec: Mapping[str, Any], settings: Mapping[str, Any]
) -> Built:
    from sirfshampoo import SIRFShampoo

    built: Built = SIRFShampoo(model, **sirfshampoo_options(spec), **settings)
    return built


def _adamw(**options: Any) -> "Builder":
    def build(model: nn.Module, spec: Mapping[str, Any], _: Any) -> Built:
        return torch.optim.AdamW(model.parameters(), lr=LR, **options)

    return build


def hidden_matrices(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what Muon's documentation gives to it, and what it leaves to AdamW."""
    matrices, others = [], []
    for name, p in model.named_parameters():
        outside = p.ndim != 2 or "embedding" in name or "head" in name
        if p.requires_grad:
            (others if outside else matrices).append(p)
    return matrices, others


def _muon(model: nn.Module, spec: Mapping[str, Any], _: Any) -> Built:
    matrices, others = hidden_matrices(model)
    built: list[Optimizer] = []
    if matrices:
        built.append(torch.optim.Muon(matrices, lr=LR))
    if others:
        built.append(torch.optim.AdamW(others, lr=LR, foreach=True))
    return Together(*built)


def _pytorch_optimizer(name: str, period: str) -> "Builder":
    def build(model: nn.Module, spec: Mapping[str, Any], _: Any) -> Built:
        import pytorch_optimizer

        kind = getattr(pytorch_optimizer, name)
        built: Built = kind(model.parameters(), lr=LR, **{period: spec["T"]})
        return built

    return build


def _heavyball(name: str, period: Callable[[int], dict[str, float]]) -> "Builder":
    def build(model: nn.Module, spec: Mapping[str, Any], _: Any) -> Built:
        import heavyball
        import heavyball.utils

        params = list(model.parameters())
        if params[0].device.type == "cpu":  # compiled, it would need a C++ compiler
            heavyball.utils.compile_mode = None
        built: Built = getattr(heavyball, name)(params, lr=LR, **period(spec["T"]))
        return built

    return build


Builder = Callable[[nn.Module, Mapping[str, Any], Mapping[str, Any]], Built]

BUILDERS: dict[str, Builder] = {
    "SIRFShampoo": _sirfshampoo,
    "AdamW(foreach=True)": _adamw(foreach=True),
    "AdamW(fused=True)": _adamw(fused=True),
    "Muon": _muon,
    "pytorch-optimizer SOAP": _pytorch_optimizer("SOAP", "precondition_frequency"),
    "pytorch-optimizer Shampoo": _pytorch_optimizer(
        "Shampoo", "preconditioning_compute_steps"
    ),
    "heavyball SOAP": _heavyball("SOAP", lambda T: {"precondition_frequency": T}),
    "heavyball PSGD-Kron": _heavyball(
        "PSGDKron", lambda T: {"preconditioner_update_probability": 1 / T}
    ),
}
"""How each is built; a new optimizer joins with one line."""


def build(
    spec: Mapping[str, Any], model: nn.Module, settings: Mapping[str, Any]
) -> Built:
    """Construct the optimizer that `spec` describes.

    Args:
        spec: What `Contestant.spec` returns; `SIRFShampoo` if it names no optimizer.
        model: Whose parameters it steps on.
        settings: More arguments of `SIRFShampoo`.
    """
    return BUILDERS[spec.get("optimizer", "SIRFShampoo")](model, spec, settings)
