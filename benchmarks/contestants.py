"""The optimizers that are timed beside each other, each described by plain data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIXED: dict[str, str] = {"1": "diagonal", "2": "dense"}
"""Dense factors for matrices, diagonal ones for vectors (keys: number of axes)."""


@dataclass(frozen=True)
class Contestant:
    """One optimizer with its settings.

    What is not named here has the optimizer's documented default. Parameters and
    gradients are always float32; `dtype` is that of the Kronecker factors.

    Attributes:
        package: Who supplies it: `"torch"`, `"ours"`, `"official"`, or the name of
            another package.
        title: The configuration in words.
        structures: As the argument of `SIRFShampoo`, with keys as strings. `None`
            for another optimizer.
        dtype: Name of the data type of the factors.
        T: Steps from one update of the factors to the next.
    """

    package: str
    title: str
    structures: str | dict[str, str] | None = None
    dtype: str = "float32"
    T: int = 1

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
        """Return what a worker needs to build the optimizer."""
        if self.structures is not None:
            optimizer = "SIRFShampoo"
        elif self.package == "torch":
            optimizer = self.title
        else:
            optimizer = f"{self.package} {self.title}"
        spec: dict[str, Any] = {"optimizer": optimizer, "structures": self.structures}
        return spec | {"dtype": self.dtype, "T": self.T}


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

    Args:
        only: A regular expression that their labels hold.
        structures: Structures of this package to time in place of those that are
            listed; `"mixed"` for dense matrices and diagonal vectors.
        dtypes: Data types of the factors. If empty: those listed, or with
            `structures` float32.
        periods: Values of `T`. If empty: those listed, or with `structures` 1.
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
