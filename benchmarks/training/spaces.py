"""Who is trained, and which settings random search draws for each.

A contestant joins with one line: its title, who builds it (`optimizers.BUILDERS`), and
its settings. A setting that is a distribution is searched, any other value is fixed;
a contestant without a distribution is not searched at all. Settings go to the
optimizer's constructor by name, for `sirfshampoo` with all that it accepts.

What holds for all: the number of trials, warm-up and cosine, the batches, the first
weights. Each space has three dimensions, of which the learning rate spans two and a
half decades.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LogUniform:
    """Numbers whose logarithm is uniform; drawn to three digits, to be written down."""

    low: float
    high: float

    def draw(self, rng: random.Random) -> float:
        """Draw a number."""
        exponent = rng.uniform(math.log(self.low), math.log(self.high))
        return float(f"{math.exp(exponent):.3g}")

    def __str__(self) -> str:
        return f"{self.low:g} … {self.high:g}"


@dataclass(frozen=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def __init__(self, *values: Any) -> None:
        object.__setattr__(self, "values", values)

    def draw(self, rng: random.Random) -> Any:
        """Draw a value."""
        return rng.choice(self.values)

    def __str__(self) -> str:
        return ", ".join(map(str, self.values))


@dataclass(frozen=True)
class Contestant:
    """An optimizer with its settings, some of them to be searched."""

    title: str
    builder: str
    settings: Mapping[str, Any]

    @property
    def searched(self) -> bool:
        """Whether anything is left to search."""
        return any(isinstance(x, LogUniform | Choice) for x in self.settings.values())

    def draw(self, task: str, name: str, trial: int) -> dict[str, Any]:
        """Return the settings of one trial.

        They follow from the arguments alone: a search that was interrupted, or is made
        longer, meets the same ones.
        """
        rng = random.Random(f"{task} {name} {trial}")
        return {
            key: x.draw(rng) if isinstance(x, LogUniform | Choice) else x
            for key, x in self.settings.items()
        }

    def space(self) -> dict[str, Any]:
        """Return the settings with the distributions in words."""
        return {
            key: str(x) if isinstance(x, LogUniform | Choice) else x
            for key, x in self.settings.items()
        }


def _mixed(structure: str) -> dict[str, str]:
    """Return a structure for matrices and kernels, and diagonal vectors."""
    return {"1": "diagonal", "2": structure, "3": structure, "4": structure}


_LR = LogUniform(3e-4, 1e-1)
_DECAY = Choice(0.0, 0.01, 0.1)
_OURS = {
    "lr": LogUniform(3e-5, 1e-2),
    "beta2": LogUniform(0.03, 0.6),
    "lam": LogUniform(1e-6, 1e-3),
    "structures": _mixed("dense"),
}
_BF16 = {"preconditioner_dtypes": "bfloat16"}
_SOAP = {"lr": _LR, "beta2": Choice(0.9, 0.95, 0.99), "weight_decay": _DECAY}

#: The recipe less one of what it switches on.
_CHANGED: dict[str, tuple[str, dict[str, Any]]] = {
    "inverse": ("exponent 1", {"exponent": 1.0}),
    "mixed": ("exponent 0.75: the inverse on the first axis", {"exponent": 0.75}),
    "alone": ("factors without momentum", {"alpha2": 0.0}),
    "identity": ("factors start at the identity", {"initial_factors": "identity"}),
    "T10": ("T = 10 from the start", {"T": 10}),
    "momentum-last": ("momentum after pre-conditioning", {"momentum_first": False}),
    "heavy-ball": ("without Nesterov's look ahead", {"nesterov": False}),
    "natural": ("U at its own size", {"normalize_update": False, "lr": 4e-3}),
    "following": (
        "steps that shrink with the gradient",
        {"follow_gradient": True},
    ),
    "unlimited": (
        "no limit relative to the parameter",
        {"max_relative_update": None},
    ),
    "frobenius": ("clamp by ‖m‖_F", {"clamp": "frobenius"}),
    "absolute": (
        "absolute damping",
        {"relative_damping": False, "lam": 1e-6},
    ),
    "plain-decay": ("decay not cautious", {"cautious_decay": False}),
    "adamw-decay": ("weight_decay=0.1", {"weight_decay": 0.1}),
    "untold": ("not told `steps`", {"steps": None}),
    "cold": ("no warm-up", {"schedule": {"warms": False}}),
    "constant": ("a constant rate after the warm-up", {"schedule": {"falls": False}}),
    "flat": (
        "a constant rate from the start, not told `steps`",
        {"steps": None, "schedule": {"warms": False, "falls": False}},
    ),
}

CONTESTANTS: dict[str, Contestant] = {
    "sgd": Contestant(
        "SGD with momentum",
        "sgd",
        {
            "lr": LogUniform(3e-3, 1.0),
            "momentum": Choice(0.8, 0.9, 0.95),
            "nesterov": Choice(False, True),
        },
    ),
    "adamw": Contestant(
        "AdamW",
        "adamw",
        {"lr": _LR, "beta2": Choice(0.95, 0.99, 0.999), "weight_decay": _DECAY},
    ),
    # The learning rate serves AdamW, too: updates are scaled to the size of AdamW's.
    "muon": Contestant(
        "Muon",
        "muon",
        {"lr": _LR, "momentum": Choice(0.9, 0.95, 0.98), "weight_decay": _DECAY},
    ),
    "muon-tuned": Contestant(
        "Muon, AdamW with a rate of its own",
        "muon",
        {"lr": _LR, "adamw_lr": _LR, "momentum": 0.95, "weight_decay": _DECAY},
    ),
    "normuon": Contestant(
        "NorMuon, AdamW with a rate of its own",
        "normuon",
        {"lr": _LR, "adamw_lr": _LR, "momentum": 0.95, "weight_decay": _DECAY},
    ),
    "soap": Contestant("SOAP, T = 10", "soap", _SOAP | {"precondition_frequency": 10}),
    "kl-shampoo": Contestant(
        "KL-Shampoo, T = 10", "kl-shampoo", _SOAP | {"precondition_frequency": 10}
    ),
    # With its own schedule, which updates less with every step.
    "psgd-kron": Contestant(
        "PSGD-Kron",
        "psgd-kron",
        {
            "lr": LogUniform(1e-4, 3e-2),
            "beta": Choice(0.9, 0.95, 0.98),
            "weight_decay": _DECAY,
        },
    ),
    "sirf": Contestant("SIRFShampoo, dense", "sirfshampoo", _OURS),
    "sirf-T10": Contestant(
        "SIRFShampoo, dense, T = 10", "sirfshampoo", _OURS | {"T": 10}
    ),
    "sirf-bf16-T10": Contestant(
        "SIRFShampoo, dense, bfloat16, T = 10", "sirfshampoo", _OURS | _BF16 | {"T": 10}
    ),
    **{
        f"sirf-{name}": Contestant(
            f"SIRFShampoo, {structure}",
            "sirfshampoo",
            _OURS | {"structures": _mixed(structure)},
        )
        for name, structure in {
            "diagonal": "diagonal",
            "block": "block30diagonal",
            "hierarchical": "hierarchical15_15",
            "tril": "triltoeplitz",
            "triu": "triutoeplitz",
        }.items()
    },
    # `lr` and `weight_decay` are what the recipe is told of AdamW; None: its own.
    "sirf-around": Contestant(
        "SIRFShampoo, searched around the recipe",
        "recipe",
        {
            "lr": LogUniform(1e-4, 3e-2),
            "beta2": LogUniform(0.1, 0.6),
            "weight_decay": Choice(None, 3.0, 10.0),
        },
    ),
    # Fixed settings: nothing is searched, other learning rates are tried beside.
    "sirf-defaults": Contestant("SIRFShampoo, documented defaults", "sirfshampoo", {}),
    "sirf-recipe": Contestant("SIRFShampoo, the recipe", "recipe", {}),
    "sirf-recipe-bf16": Contestant(
        "SIRFShampoo, the recipe, bfloat16", "recipe", _BF16
    ),
    **{
        f"recipe-{name}": Contestant(f"the recipe, {title}", "recipe", settings)
        for name, (title, settings) in _CHANGED.items()
    },
}
"""What `--contestant` accepts."""

UNIT = "adamw"
"""Whose best loss the others are timed against."""

MAIN = (
    "sgd",
    "adamw",
    "muon",
    "soap",
    "kl-shampoo",
    "psgd-kron",
    "sirf",
    "sirf-T10",
    "sirf-bf16-T10",
    "sirf-diagonal",
    "sirf-around",
    "sirf-recipe",
    "sirf-recipe-bf16",
    "sirf-defaults",
)
"""Who takes part unasked."""

ON_HELD_OUT = ("adamw", "muon-tuned", "normuon", "soap", "sirf-recipe")
"""Who takes part unasked on the tasks that the recipe was not made on."""
