"""The optimizers that are timed beside each other, each described by plain data."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

BATCH_SIZE = 8
LR = 1e-3

MIXED: dict[str, str] = {"1": "diagonal", "2": "dense"}
"""Dense factors for matrices, diagonal ones for vectors (keys: number of axes)."""


@dataclass(frozen=True)
class Contestant:
    """One optimizer with its settings.

    What is not named here has the optimizer's documented default. Parameters and
    gradients are always float32.
    """

    package: str  # "torch", "ours", "official", or the name of another package
    title: str  # the configuration in words
    structures: str | dict[str, str] | None = None  # None: another optimizer
    dtype: str = "float32"  # of the factors
    T: int = 1  # steps from one update of the factors to the next

    @property
    def has_period(self) -> bool:
        """Whether some steps cost more than others, by `T`."""
        return self.package != "torch"

    @property
    def label(self) -> str:
        """The name that `--only` searches, different for every contestant."""
        label = f"{self.package} {self.title}"
        if self.structures is not None:
            label += f" {self.dtype}"
        return f"{label} T={self.T}" if self.has_period else label

    def spec(self) -> dict[str, Any]:
        """Return what a worker needs to build it: a builder and its settings."""
        if self.structures is not None:
            return ours(self.structures, self.dtype, self.T)
        return other(f"{self.package} {self.title}", self.T)


def ours(structures: Any, dtype: str = "float32", T: int = 1) -> dict[str, Any]:
    """Return what a worker needs to build a `SIRFShampoo`, of either package."""
    settings = {"T": T, "batch_size": BATCH_SIZE, "structures": structures}
    settings["preconditioner_dtypes"] = dtype
    return {"builder": "sirfshampoo", "settings": settings}


OTHERS: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
    "torch AdamW(foreach=True)": ("adamw", lambda T: {"foreach": True}),
    "torch AdamW(fused=True)": ("adamw", lambda T: {"fused": True}),
    "torch Muon": ("muon", lambda T: {"adjust_lr_fn": "original", "foreach": True}),
    "pytorch-optimizer SOAP": ("soap", lambda T: {"precondition_frequency": T}),
    "pytorch-optimizer Shampoo": (
        "shampoo",
        lambda T: {"preconditioning_compute_steps": T},
    ),
    "heavyball SOAP": ("heavyball-soap", lambda T: {"precondition_frequency": T}),
    "heavyball PSGD-Kron": (
        "psgd-kron",
        lambda T: {"preconditioner_update_probability": 1 / T},
    ),
}
"""Builders of other optimizers, and their settings but the learning rate, by `T`."""


def other(name: str, T: int = 1) -> dict[str, Any]:
    """Return what a worker needs to build one of `OTHERS`."""
    builder, settings = OTHERS[name]
    return {"builder": builder, "settings": {"lr": LR, **settings(T)}}


UNIT = Contestant("torch", "AdamW(foreach=True)")
"""One step of it is the unit of all ratios."""

LIMITS_HOLD_ON = "gpt256"
"""The workload that `LIMITS` is for."""

_STRUCTURES = (
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
)
_TITLES = {"dense": "all dense", "mixed": "dense matrices, diagonal vectors"}
_PERIODS = (1, 10)

LIMITS: dict[tuple[str, str, int], float] = {
    ("diagonal", "float32", 1): 1.3,
    ("block30diagonal", "float32", 1): 5.0,
    ("hierarchical15_15", "float32", 1): 6.0,
    ("triltoeplitz", "float32", 1): 10.0,
    ("triutoeplitz", "float32", 1): 10.0,
    (_TITLES["mixed"], "float32", 1): 50.0,
    (_TITLES["mixed"], "bfloat16", 1): 20.0,
    (_TITLES["mixed"], "float32", 10): 11.0,
    (_TITLES["mixed"], "bfloat16", 10): 5.0,
}
"""What a step is to take at most, in steps of the unit, by title, type and `T`."""

AGAINST_OFFICIAL: dict[str, dict[int, float]] = {
    LIMITS_HOLD_ON: {1: 1.4, 10: 2.5},
    "mlp100": {1: 4.0},
}
"""How many times faster than the official package a step is to be, by workload, `T`."""

_DTYPES = ("float32", "bfloat16")

CONTESTANTS: tuple[Contestant, ...] = (
    Contestant("torch", "AdamW(fused=True)"),
    Contestant("torch", "Muon"),
    *(
        Contestant("ours", name, name, dtype)
        for name in _STRUCTURES
        for dtype in _DTYPES
    ),
    *(
        Contestant("ours", _TITLES["mixed"], MIXED, dtype, T)
        for T in _PERIODS
        for dtype in _DTYPES
    ),
    # Neighbours in this list are neighbours in time: the pairs are compared directly.
    *(
        Contestant(package, _TITLES["dense"], "dense", dtype, T)
        for T in _PERIODS
        for dtype in _DTYPES
        for package in ("ours", "official")
    ),
    Contestant("pytorch-optimizer", "SOAP", T=1),
    Contestant("pytorch-optimizer", "SOAP", T=10),
    Contestant("pytorch-optimizer", "Shampoo", T=10),
    Contestant("heavyball", "SOAP", T=1),
    Contestant("heavyball", "SOAP", T=10),
    Contestant("heavyball", "PSGD-Kron", T=1),
    Contestant("heavyball", "PSGD-Kron", T=10),
)
"""Everything that is timed unasked; a new contestant joins with one line."""


def choose(
    only: str = "",
    structures: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    periods: Sequence[int] = (),
) -> list[Contestant]:
    """Return the contestants that the command line asks for.

    `only` is a regular expression that their labels hold. Structures, if there are any,
    are those of this package to time in place of those that are listed; types and
    periods are then float32 and 1, if none are given, and else those listed.
    """
    listed = CONTESTANTS
    if structures:
        listed = tuple(
            Contestant(
                "ours",
                _TITLES.get(name, name),
                MIXED if name == "mixed" else name,
                dtype,
                T,
            )
            for name in structures
            for T in periods or (1,)
            for dtype in dtypes or ("float32",)
        )
    return [
        c
        for c in listed
        if re.search(only, c.label)
        and (not dtypes or c.structures is None or c.dtype in dtypes)
        and (not periods or not c.has_period or c.T in periods)
    ]
