"""The optimizers that are timed beside each other, each described by plain data."""

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
        package: Who supplies it: `"torch"`, `"ours"` or `"official"`.
        title: The configuration in words.
        structures: As the argument of `SIRFShampoo`, with keys as strings. `None`
            for an optimizer that has no factors.
        dtype: Name of the data type of the factors.
        T: Steps from one update of the factors to the next.
    """

    package: str
    title: str
    structures: str | dict[str, str] | None = None
    dtype: str = "float32"
    T: int = 1

    @property
    def label(self) -> str:
        """The name that `--only` searches, different for every contestant."""
        if self.structures is None:
            return f"{self.package} {self.title}"
        return f"{self.package} {self.title} {self.dtype} T={self.T}"

    def spec(self) -> dict[str, Any]:
        """Return what a worker needs to build the optimizer."""
        return {"structures": self.structures, "dtype": self.dtype, "T": self.T}


UNIT = Contestant("torch", "AdamW(foreach=True)")
"""One step of it is the unit of all ratios."""

LIMITS_HOLD_ON = "gpt256"
"""The workload that the limits below are for."""

LIMITS: dict[str, float] = {
    "diagonal": 2.5,
    "block30diagonal": 10.0,
    "hierarchical15_15": 11.0,
    "triltoeplitz": 30.0,
    "triutoeplitz": 30.0,
}
"""What a float32 step at T = 1 may take, in steps of the unit."""

AGAINST_OFFICIAL: dict[int, float] = {1: 1.0, 10: 1.5}
"""How many times faster than the official package a step has to be, by `T`."""

_DTYPES = ("float32", "bfloat16")

CONTESTANTS: tuple[Contestant, ...] = (
    *(Contestant("ours", name, name, dtype) for name in LIMITS for dtype in _DTYPES),
    *(
        Contestant("ours", "dense matrices, diagonal vectors", MIXED, dtype, T)
        for T in AGAINST_OFFICIAL
        for dtype in _DTYPES
    ),
    # Neighbours in this list are neighbours in time: the pairs are compared directly.
    *(
        Contestant(package, "all dense", "dense", dtype, T)
        for T in AGAINST_OFFICIAL
        for dtype in _DTYPES
        for package in ("ours", "official")
    ),
)
"""Everything that can be timed; a new contestant joins with one line."""
