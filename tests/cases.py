"""The one list of configurations and the one list of models that the tests share.

A new entry joins every test that is parametrised by the list. Entries of `CONFIGS` are
keyword arguments of `SIRFShampoo`; models of `MODELS` have parameters of 1 to 5 axes,
hence every dict-valued setting has an entry for 1 to 5 axes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, bfloat16, float16, float32, float64, nn

from sirfshampoo import GrowingInterval

DOCUMENTED_STRUCTURES = (
    "dense",
    "diagonal",
    "block30diagonal",
    "hierarchical15_15",
    "triltoeplitz",
    "triutoeplitz",
)
# the documented ones, and names with other sizes
STRUCTURES = (*DOCUMENTED_STRUCTURES, "block7diagonal", "hierarchical3_2")
# those that hold symmetric matrices
SYMMETRIC = ("dense", "block7diagonal", "diagonal", "block30diagonal")


# --- configurations -------------------------------------------------------------------
def mixture(
    first: int, names: tuple[str, ...] = STRUCTURES
) -> dict[int, tuple[str, ...]]:
    """Give consecutive axes consecutive structures of a list, from `first` on."""
    return {
        axes: tuple(names[(first + n) % len(names)] for n in range(axes))
        for axes in range(1, 6)
    }


def alternate(*dtypes: torch.dtype | None) -> dict[int, tuple[torch.dtype | None, ...]]:
    """Give consecutive axes the dtypes in turn."""
    return {
        axes: tuple(dtypes[n % len(dtypes)] for n in range(axes))
        for axes in range(1, 6)
    }


def at_powers_of_two(step: int) -> bool:
    """Update the pre-conditioner in steps 0, 1, 2, 4, 8, ..."""
    return step & (step - 1) == 0


# Large enough that parameters and factors visibly move within a few steps.
FAST: dict[str, Any] = {"lr": 0.05, "beta2": 0.2, "lam": 0.01}

CONFIGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    **{name: {**FAST, "structures": name} for name in STRUCTURES},
    **{
        f"mixture-from-{name}": {**FAST, "structures": mixture(i)}
        for i, name in enumerate(STRUCTURES)
    },
    "dense-vectors-diagonal-rest": {
        **FAST,
        "structures": {1: "dense"} | dict.fromkeys((2, 3, 4, 5), "diagonal"),
    },
    "alpha1=0": {**FAST, "alpha1": 0.0, "structures": mixture(0)},
    "alpha2=0": {**FAST, "alpha2": 0.0, "structures": mixture(0)},
    "kappa=0.1": {**FAST, "kappa": 0.1, "structures": mixture(0)},
    "lam=0": {**FAST, "lam": 0.0, "structures": mixture(3)},
    "lam=1": {**FAST, "lam": 1.0, "structures": mixture(3)},
    "alphas=0,kappa=0.1": {**FAST, "alpha1": 0.0, "alpha2": 0.0, "kappa": 0.1},
    "T=3": {**FAST, "T": 3, "kappa": 0.01, "structures": mixture(2)},
    "T=at-powers-of-two": {**FAST, "T": at_powers_of_two, "structures": mixture(4)},
    "from-the-gradient": {
        **FAST,
        "initial_factors": "gradient",
        "structures": mixture(0),
    },
    "momentum-first": {
        **FAST,
        "momentum_first": True,
        "kappa": 0.1,
        "structures": mixture(1),
    },
    "normalized": {**FAST, "normalize_update": True, "structures": mixture(2)},
    "normalized-momentum-of-updates": {
        **FAST,
        "normalize_update": True,
        "nesterov": True,
        "structures": "diagonal",
    },
    "following": {**FAST, "follow_gradient": True, "structures": mixture(1)},
    "following-diagonal-momentum-first": {
        **FAST,
        "momentum_first": True,
        "normalize_update": True,
        "follow_gradient": True,
        "structures": "diagonal",
    },
    "limited": {
        **FAST,
        "max_relative_update": 0.001,
        "kappa": 0.1,
        "structures": mixture(2),
    },
    "spectral-clamp": {**FAST, "clamp": "spectral", "structures": mixture(3)},
    "spectral-clamp-diagonal": {**FAST, "clamp": "spectral", "structures": "diagonal"},
    "relative-damping": {**FAST, "relative_damping": True, "structures": mixture(4)},
    "relative-damping-diagonal": {
        **FAST,
        "relative_damping": True,
        "structures": "diagonal",
    },
    "nesterov": {**FAST, "nesterov": True, "kappa": 0.1, "structures": mixture(1)},
    "cautious-decay": {
        **FAST,
        "cautious_decay": True,
        "kappa": 0.5,
        "structures": mixture(1),
    },
    "vectors-do-not-decay": {
        **FAST,
        "decay_vectors": False,
        "kappa": 0.5,
        "structures": mixture(1),
    },
    "exponent=0.5": {**FAST, "exponent": 0.5, "structures": mixture(0, SYMMETRIC)},
    "exponent=0.5-diagonal": {**FAST, "exponent": 0.5, "structures": "diagonal"},
    "exponent=0.75": {**FAST, "exponent": 0.75, "structures": mixture(0, SYMMETRIC)},
    "exponent=0.75-diagonal,T=3": {
        **FAST,
        "exponent": 0.75,
        "T": 3,
        "structures": "diagonal",
    },
    "exponent=0.75,T=3": {
        **FAST,
        "exponent": 0.75,
        "T": 3,
        "alpha2": 0.0,
        "structures": {
            1: "dense",
            2: ("triltoeplitz", "dense"),
            3: ("hierarchical3_2", "dense", "block7diagonal"),
            4: "dense",
            5: "block7diagonal",
        },
    },
    "exponent=0.5-bfloat16,T=3": {
        **FAST,
        "exponent": 0.5,
        "T": 3,
        "preconditioner_dtypes": bfloat16,
        "structures": mixture(0, SYMMETRIC),
    },
    "all-options": {
        **FAST,
        "T": GrowingInterval(3),
        "initial_factors": "gradient",
        "exponent": 0.75,
        "momentum_first": True,
        "nesterov": True,
        "normalize_update": True,
        "follow_gradient": True,
        "max_relative_update": 0.01,
        "clamp": "spectral",
        "relative_damping": True,
        "kappa": 0.1,
        "cautious_decay": True,
        "decay_vectors": False,
        "structures": mixture(2, SYMMETRIC),
    },
    "all-options-diagonal-bfloat16": {
        **FAST,
        "initial_factors": "gradient",
        "exponent": 0.75,
        "momentum_first": True,
        "nesterov": True,
        "normalize_update": True,
        "follow_gradient": True,
        "max_relative_update": 0.01,
        "clamp": "spectral",
        "relative_damping": True,
        "preconditioner_dtypes": bfloat16,
        "structures": "diagonal",
    },
    "all-options-float16": {
        **FAST,
        "initial_factors": "gradient",
        "exponent": 0.75,
        "momentum_first": True,
        "nesterov": True,
        "normalize_update": True,
        "follow_gradient": True,
        "max_relative_update": 0.01,
        "clamp": "spectral",
        "relative_damping": True,
        "T": 2,
        "preconditioner_dtypes": float16,
        "structures": mixture(0, SYMMETRIC),
    },
    "float32-factors": {**FAST, "preconditioner_dtypes": float32},
    "bfloat16-factors": {**FAST, "preconditioner_dtypes": bfloat16},
    "float16-factors": {**FAST, "preconditioner_dtypes": float16},
    "float64-factors": {
        **FAST,
        "preconditioner_dtypes": float64,
        "structures": mixture(0),
    },
    "bfloat16-factors-mixture": {
        **FAST,
        "preconditioner_dtypes": bfloat16,
        "structures": mixture(0),
    },
    "float16-factors-mixture": {
        **FAST,
        "preconditioner_dtypes": float16,
        "structures": mixture(3),
    },
    "alternating-dtypes": {
        **FAST,
        "preconditioner_dtypes": alternate(bfloat16, None, float32),
        "structures": mixture(5),
    },
    "half-dtypes-T=3-alpha2=0": {
        **FAST,
        "T": 3,
        "alpha2": 0.0,
        "preconditioner_dtypes": alternate(float16, bfloat16),
        "structures": mixture(1),
    },
}


def dtypes_of(config: dict[str, Any], default: torch.dtype) -> Iterator[torch.dtype]:
    """Yield every dtype that factors take under a configuration."""
    choice = config.get("preconditioner_dtypes")
    for value in choice.values() if isinstance(choice, dict) else [choice]:
        for dtype in value if isinstance(value, tuple) else [value]:
            yield default if dtype is None else dtype


def coarsest_eps(config: dict[str, Any], default: torch.dtype) -> float:
    """Return the rounding of the coarsest dtype that takes part in the maths."""
    dtypes = {default, *dtypes_of(config, default)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)


# --- models ---------------------------------------------------------------------------
class Scale(nn.Module):
    """A scalar parameter (no axis at all) and one with a single entry."""

    def __init__(self) -> None:
        """Start as the identity."""
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return self.factor * x + self.shift


class SingletonAxes(nn.Module):
    """A parameter whose first, middle and last axes have size 1."""

    def __init__(self, d_out: int, d_in: int) -> None:
        """Store a d_out x d_in matrix in five axes."""
        super().__init__()
        weight = torch.randn(1, d_out, 1, d_in, 1) / d_in**0.5
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the matrix."""
        return x @ self.weight.squeeze().T


class Attention(nn.Module):
    """Self-attention that returns the values only."""

    def __init__(self, width: int, heads: int) -> None:
        """Wrap `MultiheadAttention`."""
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to itself, with a residual connection."""
        return x + self.attention(x, x, x, need_weights=False)[0]


class LastStep(nn.Module):
    """An LSTM that returns its last output."""

    def __init__(self, d_in: int, width: int) -> None:
        """Wrap `LSTM`."""
        super().__init__()
        self.lstm = nn.LSTM(d_in, width, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Read the sequence."""
        return self.lstm(x)[0][:, -1]


class TiedLanguageModel(nn.Module):
    """The output layer shares the embedding's weight and adds its own bias."""

    def __init__(self, vocabulary: int, width: int) -> None:
        """Tie the weights."""
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, vocabulary)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Predict from each token alone."""
        return self.out(self.mix(self.embed(tokens)).tanh())


@dataclass(frozen=True)
class ModelCase:
    """A small net and what it reads.

    Attributes:
        make: Builds the net from torch's present seed, in float32.
        inputs: Maps a batch size to an input, in float32 or int64.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]


def net(*layers: nn.Module) -> nn.Module:
    """Chain layers."""
    return nn.Sequential(*layers)


def real(*shape: int) -> Callable[[int], Tensor]:
    """Make inputs of normal numbers."""
    return lambda n: torch.randn(n, *shape)


def images(*shape: int) -> Callable[[int], Tensor]:
    """Make images that lie in memory with the channels last."""
    return lambda n: torch.randn(n, *shape).to(memory_format=torch.channels_last)


def tokens(vocabulary: int, length: int) -> Callable[[int], Tensor]:
    """Make sequences of token numbers."""
    return lambda n: torch.randint(vocabulary, (n, length))


def channels_last(*layers: nn.Module) -> nn.Module:
    """Chain layers, and let their weights lie in memory with the channels last."""
    return net(*layers).to(memory_format=torch.channels_last)


Conv = partial(nn.Conv2d, kernel_size=3, padding=1)

MODELS: dict[str, ModelCase] = {
    "mlp-odd-sizes": ModelCase(
        lambda: net(nn.Linear(5, 11), nn.ReLU(), nn.Linear(11, 3)), real(5)
    ),
    "mlp-axes-61-and-33": ModelCase(
        lambda: net(nn.Linear(33, 61), nn.Tanh(), nn.Linear(61, 2)), real(33)
    ),
    "mlp-equal-layers": ModelCase(
        lambda: net(*(net(nn.Linear(7, 7), nn.Tanh()) for _ in range(4))), real(7)
    ),
    "linear-1-input": ModelCase(
        lambda: net(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 3)), real(1)
    ),
    "linear-1-output": ModelCase(
        lambda: net(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)), real(5)
    ),
    "linear-1-input-1-output": ModelCase(lambda: nn.Linear(1, 1), real(1)),
    "linear-without-bias": ModelCase(lambda: nn.Linear(6, 4, bias=False), real(6)),
    "singleton-axes": ModelCase(lambda: SingletonAxes(4, 6), real(6)),
    "scalar": ModelCase(lambda: net(nn.Linear(4, 3), Scale()), real(4)),
    "conv1d": ModelCase(
        lambda: net(nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Conv1d(5, 2, 1)), real(3, 8)
    ),
    "conv2d": ModelCase(
        lambda: net(Conv(3, 6), nn.ReLU(), nn.Conv2d(6, 2, 2)), real(3, 4, 4)
    ),
    "conv3d": ModelCase(
        lambda: net(nn.Conv3d(2, 3, 2), nn.ReLU(), nn.Conv3d(3, 2, (1, 2, 1))),
        real(2, 3, 3, 3),
    ),
    "conv-transposed": ModelCase(
        lambda: net(
            nn.ConvTranspose2d(4, 3, 2), nn.Tanh(), nn.ConvTranspose2d(3, 2, 1)
        ),
        real(4, 3, 3),
    ),
    "conv-depthwise": ModelCase(
        lambda: net(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 2, 1)),
        real(4, 4, 4),
    ),
    "channels-last": ModelCase(
        lambda: channels_last(Conv(3, 6), nn.ReLU(), Conv(6, 2)), images(3, 4, 4)
    ),
    "batchnorm": ModelCase(
        lambda: net(Conv(2, 4, bias=False), nn.BatchNorm2d(4), nn.ReLU(), Conv(4, 2)),
        real(2, 3, 3),
    ),
    "groupnorm": ModelCase(
        lambda: net(Conv(2, 6), nn.GroupNorm(3, 6), nn.ReLU(), Conv(6, 2)),
        real(2, 3, 3),
    ),
    "layernorm": ModelCase(
        lambda: net(nn.Linear(5, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 2)),
        real(5),
    ),
    "attention": ModelCase(
        lambda: net(nn.Linear(3, 8), Attention(8, 2), nn.Linear(8, 3)), real(4, 3)
    ),
    "lstm": ModelCase(lambda: net(LastStep(3, 5), nn.Linear(5, 2)), real(4, 3)),
    "embedding": ModelCase(
        lambda: net(nn.Embedding(13, 6), nn.Flatten(), nn.Linear(18, 3)), tokens(13, 3)
    ),
    "tied-weights": ModelCase(lambda: TiedLanguageModel(13, 6), tokens(13, 3)),
}


def build(
    name: str, batch: int, dtype: torch.dtype = float64
) -> tuple[nn.Module, Tensor, Tensor]:
    """Build a model of the list with a batch of inputs and random targets around 1."""
    case = MODELS[name]
    model, x = case.make().to(dtype), case.inputs(batch)
    x = x.to(dtype) if x.is_floating_point() else x
    with torch.no_grad():
        y = 1 + torch.randn_like(model(x))
    return model, x, y


class Tensors(nn.Module):
    """Parameters without a net: gradients are set by hand."""

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype) -> None:
        """Draw one normal parameter for each shape."""
        super().__init__()
        tensors = (torch.randn(shape, dtype=dtype) for shape in shapes)
        self.tensors = nn.ParameterList(nn.Parameter(t) for t in tensors)


# 1 to 5 axes; sizes around 15, 30 and 60; twins that share a stack; axes of size 1
SHAPES: list[tuple[int, ...]] = [
    (),
    (1,),
    (7,),
    (16,),
    (61,),
    (33, 61),
    (30, 16),
    (5, 7),
    (5, 7),
    (5, 7),
    (1, 31),
    (29, 1),
    (1, 1),
    (4, 3, 5),
    (6, 1, 3, 3),
    (4, 3, 2, 2),
    (2, 3, 2, 3, 2),
]
