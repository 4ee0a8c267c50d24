"""Whether captured and compiled steps are the plain ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.captured import Captured, warm_up
from benchmarks.gpu.checks.common import (
    BATCH,
    FAST,
    LARGE,
    SHAPES,
    STRUCTURES,
    Check,
    Parameters,
    draw_gradients,
    equal,
    flat,
    mixture,
)
from sirfshampoo import GrowingInterval, SIRFShampoo, recipe

T = 3
BFLOAT16 = {"preconditioner_dtypes": torch.bfloat16}
CAPTURED: dict[str, dict[str, Any]] = {
    "dense, T = 1": {"T": 1},
    **{f"{name}, T = 3": {"structures": name} for name in STRUCTURES},
    "mixture, bfloat16 factors": {"structures": mixture(1), **BFLOAT16},
    "float16 factors": {"preconditioner_dtypes": torch.float16},
    "spread": {"spread_updates": True, "structures": mixture(0)},
    "the recipe": {"recipe": True},
}


def build(model: nn.Module, config: dict[str, Any]) -> SIRFShampoo:
    """Return the optimizer that a configuration describes."""
    if "recipe" in config:
        given = {**recipe(model, batch_size=BATCH), "T": T}
        return SIRFShampoo(model, batch_size=BATCH, **given)
    return SIRFShampoo(model, **{**FAST, "T": T, **config})


def take_steps(
    device: str, config: dict[str, Any], shapes: list, captures: bool
) -> Tensor:
    """Return the parameters after a warm-up, and steps that are captured or not."""
    model = Parameters(shapes, torch.float32, device)
    optimizer = build(model, config)
    period = config.get("T", T)
    draw_gradients(model, 0)

    def warm() -> None:
        for step in range(2 * period):
            draw_gradients(model, step)
            optimizer.step()

    warm_up(warm, device)
    captured = Captured(optimizer, lambda step: step % period, device)
    step = captured.step if captures else optimizer.step
    for seed in range(4 * period):
        draw_gradients(model, seed)
        step()
    assert optimizer.global_step == 6 * period
    counts = {int(optimizer.state[p]["step"]) for p in model.parameters()}
    assert counts == {6 * period}, f"step counters say {counts}"
    return flat(model)


def captured_equals_eager(device: str, config: dict[str, Any], shapes: list) -> str:
    """Compare the two to the bit."""
    paths = [take_steps(device, config, shapes, way) for way in (False, True)]
    return equal(*paths)


def one_graph_for_each_kind(device: str) -> str:
    """Compare where an interval grows, and two graphs are enough."""
    T, paths = GrowingInterval(10), []
    for captures in (False, True):
        model = Parameters(LARGE, torch.float32, device)
        optimizer = SIRFShampoo(model, **{**FAST, "T": T})
        optimizer.global_step = 900
        draw_gradients(model, 0)

        def warm(optimizer: SIRFShampoo = optimizer) -> None:
            for _ in range(20):
                optimizer.step()

        warm_up(warm, device)
        step = Captured(optimizer, T, device).step if captures else optimizer.step
        for seed in range(30):
            draw_gradients(model, seed)
            step()
        paths.append(flat(model))
    return equal(*paths)


def compiled(device: str, backend: str, config: dict[str, Any], graphs: int) -> str:
    """Compare compiled steps with plain ones; count the graphs."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter, paths = CompileCounterWithBackend(backend), []
    for compiles in (False, True):
        model = Parameters(LARGE, torch.float32, device)
        optimizer = build(model, config)
        step: Callable[[], Any] = optimizer.step
        if compiles:
            step = torch.compile(optimizer.step, backend=counter)
        for seed in range(2 * T + 1):
            draw_gradients(model, seed)
            step()
        paths.append(flat(model))
    found = counter.frame_count
    told = equal(*paths, tolerance=1e-4)
    if found != graphs:
        raise AssertionError(f"{found} graphs were compiled, not {graphs}; {told}")
    return f"{found} graphs, {told}"


def compiled_in_tf32(device: str, backend: str) -> str:
    """Compare where the compiler finds two answers on the precision of products."""
    torch.set_float32_matmul_precision("high")
    try:
        return compiled(device, backend, {"structures": "dense"}, 2)
    finally:
        torch.set_float32_matmul_precision("highest")


def checks(device: str, tiny: bool) -> list[Check]:
    """Return the checks."""
    found = [
        Check(
            f"captured: {name}",
            partial(captured_equals_eager, device, config, SHAPES),
            of_gpus=True,
        )
        for name, config in CAPTURED.items()
    ]
    for name, config in (("float32", {}), ("bfloat16 factors", BFLOAT16)):
        run = partial(captured_equals_eager, device, config, LARGE)
        found.append(Check(f"captured: larger, {name}", run, of_gpus=True))
    two = partial(one_graph_for_each_kind, device)
    return [*found, Check("captured: two kinds of steps", two, of_gpus=True)]


def compiled_checks(device: str, tiny: bool) -> list[Check]:
    """Return those that need the compiler, which takes long and may be missing."""
    backend = "eager" if device == "cpu" else "inductor"
    configs = {
        "dense, T = 3": ({"structures": "dense"}, 2),
        "mixture, T = 3": ({"structures": {2: mixture(0)[2], 1: "diagonal"}}, 2),
        "the recipe, T = 3": ({"recipe": True}, 2),
    }
    found = [
        Check(f"compiled: {name}", partial(compiled, device, backend, *config))
        for name, config in configs.items()
    ]
    run = partial(compiled_in_tf32, device, backend)
    return [*found, Check("compiled: where the model is to use TF32", run)]
