"""Whether the numbers are those of the paper, whatever the type and the mode."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.checks.common import (
    FAST,
    LARGE,
    SHAPES,
    STRUCTURES,
    TYPES,
    Check,
    Parameters,
    draw_gradients,
    mixture,
)
from sirfshampoo import SIRFShampoo
from tests.twin import Twin, assert_agree, find_units

TOLERANCES = {
    torch.float64: 1e-11,
    torch.float32: 5e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
HALF = {"exponent": 0.75, "structures": "dense", "momentum_first": True}
CONFIGS: dict[str, dict[str, Any]] = {
    **{name: {"structures": name} for name in STRUCTURES},
    "mixture": {"structures": mixture(1), "T": 2, "kappa": 0.1},
    "like the recipe": {**HALF, "nesterov": True, "initial_factors": "gradient"},
    "following": {"structures": "dense", "follow_gradient": True},
}


def follow(
    device: str,
    dtype: torch.dtype,
    config: dict[str, Any],
    shapes: list = SHAPES,
    steps: int = 5,
) -> None:
    """Let optimizer and twin take the same steps; compare."""
    model = Parameters(shapes, dtype, device)
    given = {**FAST, **config}
    optimizer = SIRFShampoo(model, **given)
    batch = given.pop("batch_size")
    given.pop("preconditioner_dtypes", None)
    with torch.device(device):  # the twin's own tensors
        twin = Twin(find_units(model), **given)
    for step in range(steps):
        gradients = draw_gradients(model, step)
        optimizer.step()
        with torch.device(device), torch.no_grad():
            twin.step(gradients, batch)
    with torch.device(device):
        assert_agree(twin, optimizer, TOLERANCES[dtype])


def _by_matmul_precision() -> None:
    torch.set_float32_matmul_precision("high")


def _by_backend() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def _by_all_backends() -> None:
    torch.backends.fp32_precision = "tf32"


TF32: dict[str, Callable[[], None]] = {
    "torch.set_float32_matmul_precision": _by_matmul_precision,
    "torch.backends.cuda.matmul.fp32_precision": _by_backend,
    "torch.backends.fp32_precision": _by_all_backends,
}


def in_tf32(device: str, switch: Callable[[], None]) -> None:
    """Follow the twin in float32 where the user wants TF32 in the model."""
    torch.set_float32_matmul_precision("highest")
    switch()
    try:
        follow(device, torch.float32, {"structures": "dense"}, LARGE)
    finally:
        torch.backends.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def in_autocast(device: str) -> None:
    """Follow the twin where `step` is called within autocast."""
    with torch.autocast(device, dtype=torch.bfloat16):
        model = Parameters(LARGE, torch.float32, device)
        plain = Parameters(LARGE, torch.float32, device)
        optimizers = [SIRFShampoo(m, **FAST) for m in (model, plain)]
        for step in range(3):
            draw_gradients(model, step)
            optimizers[0].step()
    for step in range(3):
        draw_gradients(plain, step)
        optimizers[1].step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def checks(device: str, tiny: bool) -> list[Check]:
    """Return the checks."""
    found = [
        Check(f"{name}, {dtype}", partial(follow, device, dtype, config))
        for dtype in TYPES
        for name, config in CONFIGS.items()
    ]
    factors = {"structures": mixture(0), "preconditioner_dtypes": torch.bfloat16}
    half = partial(follow, device, torch.bfloat16, factors | {"T": 2})
    found.append(Check("bfloat16 factors, T = 2", half))
    large = [(512, 300)] if tiny else [(1024, 2048), (1024, 2048), (3000,)]
    for dtype in TYPES:
        config = {"structures": {1: "diagonal", 2: "dense"}}
        run = partial(follow, device, dtype, config, large, 3)
        found.append(Check(f"large, {dtype}", run))
    found += [
        Check(f"TF32 by {name}", partial(in_tf32, device, switch), of_gpus=True)
        for name, switch in TF32.items()
    ]
    return [*found, Check("within autocast", partial(in_autocast, device))]
