"""Whether numbers survive: what is not finite, too large, or moved elsewhere."""

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.checks.common import (
    BATCH,
    FAST,
    SHAPES,
    Check,
    Parameters,
    draw_gradients,
    equal,
    flat,
    mixture,
    no_waiting,
)
from sirfshampoo import SIRFShampoo, recipe

BAD = 4  # of three parameters that share a stack, the first
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": {"structures": mixture(1)},
    "diagonal": {"structures": "diagonal"},
    "bfloat16 factors": {"preconditioner_dtypes": torch.bfloat16},
    "float16 factors": {"preconditioner_dtypes": torch.float16},
    "momentum first": {"momentum_first": True, "nesterov": True},
}


def bad_gradient(device: str, config: dict[str, Any], value: float) -> None:
    """Give one parameter a gradient that is not finite: it alone rests."""
    model = Parameters(SHAPES, torch.float32, device)
    optimizer = SIRFShampoo(model, **{**FAST, **config})
    draw_gradients(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    state = {k: t.clone() for k, t in optimizer.state[model.tensors[BAD]].items()}
    draw_gradients(model, 1)
    model.tensors[BAD].grad[1, 2].fill_(value)
    with no_waiting(device):
        optimizer.step()
    for i, (p, was) in enumerate(zip(model.parameters(), before, strict=True)):
        rests = torch.equal(p, was)
        assert rests == (i == BAD), f"parameter {i}: rests is {rests}"
        assert bool(p.isfinite().all())
    for key, tensor in optimizer.state[model.tensors[BAD]].items():
        if key == "skipped":
            assert int(tensor) == 1
        elif key != "step":
            assert torch.equal(tensor, state[key]), f"{key} has changed"


def too_large(device: str) -> str:
    """Ask for more memory than any device has: nothing is allocated."""
    embedding = nn.Embedding(2**18, 4, device=device)
    before, refusal = allocated(device), ""
    try:
        SIRFShampoo(embedding)
    except MemoryError as error:
        refusal = str(error)
    assert f"on {device}" in refusal, refusal or "256 GiB were not refused"
    assert allocated(device) == before, f"{allocated(device) - before} bytes are held"
    return refusal[:160]


def allocated(device: str) -> int:
    """Return how many bytes tensors take on a GPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def moved(device: str, config: dict[str, Any]) -> str:
    """Train on the CPU, go on elsewhere from the state, come back, and compare."""
    paths = []
    for places in (("cpu", "cpu", "cpu"), ("cpu", device, "cpu")):
        weights = saved = None
        for number, place in enumerate(places):
            model = Parameters(SHAPES, torch.float32, place)
            optimizer = SIRFShampoo(model, **{**FAST, "T": 2, **config})
            if weights is not None:
                model.load_state_dict(weights)
                optimizer.load_state_dict(saved)
            for step in range(3):
                draw_gradients(model, 3 * number + step)
                optimizer.step()
            kinds = {
                str(t.device).split(":")[0]
                for entries in optimizer.state.values()
                for key, t in entries.items()
                if key != "step"
            }
            assert kinds == {place}, f"the state lies on {kinds}"
            weights, saved = model.state_dict(), optimizer.state_dict()
        paths.append(flat(model))
    half = "preconditioner_dtypes" in config
    return equal(*paths, tolerance=5e-2 if half else 5e-4)


def model_moved(device: str) -> str:
    """Move a model after its optimizer was built."""
    paths = []
    for place in ("cpu", device):
        model = Parameters(SHAPES, torch.float32, "cpu")
        optimizer = SIRFShampoo(model, **FAST)
        draw_gradients(model, 0)
        optimizer.step()
        model.to(place)
        for step in range(1, 4):
            draw_gradients(model, step)
            optimizer.step()
        paths.append(flat(model))
    return equal(*paths, tolerance=5e-4)


def told(device: str) -> None:
    """Ask for diagnostics and for a copy on the device."""
    model = Parameters(SHAPES, torch.float32, device)
    optimizer = SIRFShampoo(model, batch_size=BATCH, **recipe(model, batch_size=BATCH))
    draw_gradients(model, 0)
    optimizer.step()
    numbers = optimizer.diagnostics()
    assert all(value == value for value in numbers.values()), numbers


def checks(device: str, tiny: bool) -> list[Check]:
    """Return the checks."""
    found = [
        Check(f"{name}: a gradient of {value}", partial(bad_gradient, device, c, value))
        for name, c in KINDS.items()
        for value in (float("nan"), float("inf"))
    ]
    found.append(Check("too large is refused", partial(too_large, device)))
    found += [
        Check(f"{name}: CPU, GPU, CPU", partial(moved, device, config), of_gpus=True)
        for name, config in KINDS.items()
    ]
    run = partial(model_moved, device)
    found.append(Check("model moved under its optimizer", run, of_gpus=True))
    return [*found, Check("diagnostics", partial(told, device))]
