"""Builds a contestant's optimizers for a network, from plain settings.

Packages are imported when they are asked for: a process sees some of them alone, and
another `sirfshampoo` perhaps.
"""

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks import environment

Settings = Mapping[str, Any]
Builder = Callable[[nn.Module, dict[str, Any]], list[Optimizer]]


def translated(settings: Settings) -> dict[str, Any]:
    """Return arguments of `SIRFShampoo` and of `summary` from what JSON knows."""
    found = dict(settings)
    if isinstance(structures := found.get("structures"), dict):  # its keys are strings
        found["structures"] = {int(n): name for n, name in structures.items()}
    if isinstance(dtype := found.get("preconditioner_dtypes"), str):
        found["preconditioner_dtypes"] = getattr(torch, dtype)
    return found


def _sirfshampoo(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    from sirfshampoo import SIRFShampoo

    return [SIRFShampoo(model, **translated(settings))]


def _recipe(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    from sirfshampoo import recipe

    told = ("lr", "weight_decay", *WANTS["recipe"])  # the rest goes to the optimizer
    arguments = {key: settings.pop(key) for key in told if key in settings}
    return _sirfshampoo(model, {**recipe(model, **arguments), **settings})


def _sgd(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), **settings)]


def _with_betas(settings: dict[str, Any], beta1: float) -> dict[str, Any]:
    """Write `beta2`, if it is given, as most constructors want it."""
    beta2 = settings.pop("beta2", None)
    return settings if beta2 is None else settings | {"betas": (beta1, beta2)}


def _adamw(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    options = _with_betas(settings, beta1=0.9)
    return [torch.optim.AdamW(model.parameters(), **options)]


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


class Float32Muon(torch.optim.Muon):
    """Muon whose Newton-Schulz iterations are in float32, not in bfloat16."""

    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        with patch.object(Tensor, "bfloat16", Tensor.clone):
            return super().step(closure)


def _muon(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    """Give hidden matrices to Muon, the rest to AdamW.

    A network that is one matrix has it hidden, too. AdamW has Muon's learning rate
    unless it is given its own, `adamw_lr`; `foreach` is for AdamW alone.
    """
    of_adamw = {"lr": settings.pop("adamw_lr", settings["lr"])}
    of_adamw |= {"foreach": settings.pop("foreach", None)}
    if "weight_decay" in settings:
        of_adamw["weight_decay"] = settings["weight_decay"]
    matrices, others = hidden_matrices(model)
    built: list[Optimizer] = []
    if matrices:
        settings = {"adjust_lr_fn": "match_rms_adamw"} | settings
        kind = Float32Muon if _is_slow_in_bfloat16(matrices) else torch.optim.Muon
        built.append(kind(matrices, **settings))
    if others:
        built.append(torch.optim.AdamW(others, **of_adamw))
    return built


def _is_slow_in_bfloat16(params: Iterable[Tensor]) -> bool:
    """Return whether Muon computes in float32 in place of bfloat16."""
    on_cpu = any(p.device.type == "cpu" for p in params)
    return on_cpu and not environment.multiplies_bfloat16()


def _normuon(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    """Give hidden matrices to NorMuon, the rest to the AdamW that it has inside.

    Updates have the root mean square .2, which AdamW's have; see `_muon`.
    """
    import pytorch_optimizer
    from pytorch_optimizer.optimizer.muon import base
    from pytorch_optimizer.optimizer.utils import matrix

    matrices, others = hidden_matrices(model)
    if _is_slow_in_bfloat16(matrices):
        in_float32 = partial(matrix.zero_power_via_newton_schulz_5, dtype=torch.float32)
        base.zero_power_via_newton_schulz_5 = in_float32
    of_adamw = {"lr": settings.pop("adamw_lr"), "betas": (0.9, 0.999)}
    of_adamw["weight_decay"] = settings["weight_decay"]
    groups: list[dict[str, Any]] = []
    if matrices:
        groups.append({"params": matrices, "use_muon": True, **settings})
    if others:
        groups.append({"params": others, "use_muon": False, **of_adamw})
    return [pytorch_optimizer.NorMuon(groups, update_scale="match_rms")]


def _pytorch_optimizer(name: str) -> Builder:
    def build(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
        import pytorch_optimizer

        kind = getattr(pytorch_optimizer, name)
        return [kind(model.parameters(), **_with_betas(settings, beta1=0.95))]

    return build


def _heavyball(name: str) -> Builder:
    def build(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
        import heavyball
        import heavyball.utils

        heavyball.utils.compile_mode = None  # it would need a C++ compiler
        # A schedule changes it in every step, which is supported for all of a group.
        warnings.filterwarnings("ignore", message="Learning rate changed between")
        kind = getattr(heavyball, name)
        return [kind(list(model.parameters()), **_with_betas(settings, beta1=0.9))]

    return build


BUILDERS: dict[str, Builder] = {
    "sirfshampoo": _sirfshampoo,
    "recipe": _recipe,
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
    "normuon": _normuon,
    "soap": _pytorch_optimizer("SOAP"),
    "shampoo": _pytorch_optimizer("Shampoo"),
    "heavyball-soap": _heavyball("SOAP"),
    "kl-shampoo": _heavyball("KLShampoo"),
    "psgd-kron": _heavyball("PSGDKron"),
}
"""How each is built; a new optimizer joins with one line."""

PACKAGE_OF = {
    "normuon": "pytorch-optimizer",
    "soap": "pytorch-optimizer",
    "shampoo": "pytorch-optimizer",
    "heavyball-soap": "heavyball",
    "kl-shampoo": "heavyball",
    "psgd-kron": "heavyball",
}
"""The packages of `environment.PACKAGES` that a builder imports."""

WANTS: dict[str, tuple[str, ...]] = {"recipe": ("batch_size", "steps")}
"""What a builder wants to know of the run, such as `"batch_size"`, beside settings."""

OURS = ("sirfshampoo", "recipe")
"""Builders of this package's optimizer."""


def build(
    builder: str,
    model: nn.Module,
    settings: Settings,
    run: Mapping[str, Any] | None = None,
) -> list[Optimizer]:
    """Construct optimizers that together step on all of a network.

    Args:
        builder: A key of `BUILDERS`.
        model: The network.
        settings: Arguments of the constructor, as JSON knows them.
        run: What describes the run, see `trial.spec_of`.
    """
    told = {key: (run or {})[key] for key in WANTS.get(builder, ())}
    return BUILDERS[builder](model, {**told, **settings})


def edition(builder: str) -> str:
    """Return which code a builder's optimizers have: a version, or a hash of ours."""
    if builder in OURS:
        return _OUR_EDITION
    found = f"torch=={torch.__version__}"
    if builder in PACKAGE_OF:
        found = environment.PACKAGES[PACKAGE_OF[builder]][0]
    in_float32 = "muon" in builder and not environment.multiplies_bfloat16()
    return found + (", Muon in float32" if in_float32 else "")


def _hash_of_sources() -> str:
    digest = hashlib.sha256()
    for path in sorted((environment.ROOT / "sirfshampoo").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


_OUR_EDITION = _hash_of_sources()  # now: the files may change before a run ends


def folders(builders: Iterable[str]) -> dict[str, Path]:
    """Install what the builders import and is not there; return where it is.

    Raises:
        RuntimeError: If pip fails, for example without a network.
    """
    packages = dict.fromkeys(
        PACKAGE_OF[name] for name in builders if name in PACKAGE_OF
    )
    return {package: environment.folder_of(package) for package in packages}
