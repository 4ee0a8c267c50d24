"""Builds a contestant's optimizers for a network, from plain settings.

The packages of others are imported when they are asked for; `folders` says where they
are.
"""

import hashlib
import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from benchmarks import environment
from benchmarks.optimizers import hidden_matrices
from sirfshampoo import GrowingInterval, SIRFShampoo, recipe

Settings = Mapping[str, Any]
Builder = Callable[[nn.Module, dict[str, Any]], list[Optimizer]]


def _sirfshampoo(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    structures = settings.get("structures")
    if isinstance(structures, dict):  # JSON has no integer keys
        settings["structures"] = {int(n): name for n, name in structures.items()}
    if "preconditioner_dtypes" in settings:
        name = settings["preconditioner_dtypes"]
        settings["preconditioner_dtypes"] = getattr(torch, name)
    if isinstance(settings.get("T"), str):
        settings["T"] = GrowingInterval(int(settings["T"].removeprefix("growing to ")))
    return [SIRFShampoo(model, **settings)]


def _recipe(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    told = ("lr", "weight_decay", *WANTS["recipe"])  # the rest goes to the optimizer
    arguments = {key: settings.pop(key) for key in told if key in settings}
    return _sirfshampoo(model, {**recipe(model, **arguments), **settings})


def _sgd(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), **settings)]


def _with_betas(settings: dict[str, Any], beta1: float) -> dict[str, Any]:
    """Write `beta2` as most constructors want it."""
    beta2 = settings.pop("beta2")
    return settings | {"betas": (beta1, beta2)}


def _adamw(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    options = _with_betas(settings, beta1=0.9)
    return [torch.optim.AdamW(model.parameters(), **options)]


def _muon(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    """Give hidden matrices to Muon, the rest to AdamW, as Muon's documentation says.

    A network that is one matrix has it hidden, too. AdamW has Muon's learning rate
    unless it is given its own, `adamw_lr`.
    """
    adamw_lr = settings.pop("adamw_lr", settings["lr"])
    matrices, others = hidden_matrices(model)
    built: list[Optimizer] = []
    if matrices:
        built.append(
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **settings)
        )
    del settings["momentum"]
    if others:
        built.append(torch.optim.AdamW(others, **settings | {"lr": adamw_lr}))
    return built


def _soap(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
    import pytorch_optimizer

    options = _with_betas(settings, beta1=0.95)
    return [pytorch_optimizer.SOAP(model.parameters(), **options)]


def _heavyball(
    name: str, translate: Callable[[dict[str, Any]], dict[str, Any]]
) -> Builder:
    def build(model: nn.Module, settings: dict[str, Any]) -> list[Optimizer]:
        import heavyball
        import heavyball.utils

        heavyball.utils.compile_mode = None  # it would need a C++ compiler
        # A schedule changes it in every step, which is supported for all of a group.
        warnings.filterwarnings("ignore", message="Learning rate changed between")
        kind = getattr(heavyball, name)
        return [kind(list(model.parameters()), **translate(settings))]

    return build


BUILDERS: dict[str, Builder] = {
    "sirfshampoo": _sirfshampoo,
    "recipe": _recipe,
    "sgd": _sgd,
    "adamw": _adamw,
    "muon": _muon,
    "soap": _soap,
    "kl-shampoo": _heavyball("KLShampoo", lambda x: _with_betas(x, beta1=0.9)),
    "psgd-kron": _heavyball("PSGDKron", lambda x: x),
}
"""How each is built; a new optimizer joins with one line."""

PACKAGE_OF = {
    "soap": "pytorch-optimizer",
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
    if builder in PACKAGE_OF:
        return environment.PACKAGES[PACKAGE_OF[builder]][0]
    return _OUR_EDITION if builder in OURS else f"torch=={torch.__version__}"


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


def seed(number: int) -> None:
    """Seed all that an optimizer or a network may draw from."""
    torch.manual_seed(number)
    random.seed(number)
