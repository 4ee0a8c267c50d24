"""Whether the host ever waits for the device in a step."""

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.checks.common import (
    FAST,
    SHAPES,
    STRUCTURES,
    Check,
    Parameters,
    draw_gradients,
    flat,
    mixture,
    no_waiting,
)
from sirfshampoo import SIRFShampoo, recipe

PLAIN: dict[str, dict[str, Any]] = {
    "T = 1": {},
    "T = 10": {"T": 10},
    "T = 10, spread": {"T": 10, "spread_updates": True},
    "no momenta": {"alpha1": 0.0, "alpha2": 0.0},
    "bfloat16 factors, T = 10": {"T": 10, "preconditioner_dtypes": torch.bfloat16},
    "float16 factors": {"preconditioner_dtypes": torch.float16},
    "limits": {
        "normalize_update": True,
        "follow_gradient": True,
        "max_relative_update": 0.1,
        "clamp": "spectral",
        "relative_damping": True,
    },
    **{name: {"structures": name} for name in STRUCTURES},
    "mixture": {"structures": mixture(2), "T": 3},
}


def take_steps(device: str, config: dict[str, Any], steps: int = 12) -> None:
    """Take steps, the first among them, without a wait."""
    model = Parameters(SHAPES, torch.float32, device)
    optimizer = SIRFShampoo(model, **{**FAST, "kappa": 0.1, **config})
    start = flat(model)
    for step in range(steps):
        draw_gradients(model, step)
        if step == 2:
            model.tensors[5].grad = None  # one of three in a stack
        with no_waiting(device):
            optimizer.step()
    assert not torch.equal(flat(model), start)


def rate_on_device(device: str) -> None:
    """Take steps with a learning rate that lies on the device."""
    take_steps(device, {"lr": torch.tensor(0.01, device=device), "T": 3})


def as_default_device(device: str) -> None:
    """Take steps where new tensors come into being on the device."""
    model = Parameters([(7, 5), (7, 5), (3,)], torch.float32, device)
    with torch.device(device):
        optimizer = SIRFShampoo(model, **FAST)
    for step in range(3):
        draw_gradients(model, step)
        with torch.device(device), no_waiting(device):
            optimizer.step()
    counters = {str(optimizer.state[p]["step"].device) for p in model.parameters()}
    assert counters == {"cpu"}, f"step counters lie on {counters}"


def the_recipe(device: str) -> None:
    """Take steps with the recipe, from gradients of a net."""
    model = nn.Sequential(
        nn.Embedding(50, 16), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 50)
    ).to(device)
    optimizer = SIRFShampoo(model, **recipe(model, batch_size=8, steps=100))
    optimizer_by_count = SIRFShampoo(model)
    for step in range(12):
        words = torch.randint(50, (8, 4), device=device)
        loss = nn.functional.cross_entropy(model(words).flatten(0, 1), words.flatten())
        # the counter of examples is on the path of a backward pass
        with no_waiting(device):
            loss.backward()
        with no_waiting(device):
            (optimizer if step % 4 else optimizer_by_count).step()
        optimizer.zero_grad()
        optimizer_by_count.zero_grad()


def checks(device: str, tiny: bool) -> list[Check]:
    """Return the checks."""
    found = [
        Check(name, partial(take_steps, device, config), of_gpus=True)
        for name, config in PLAIN.items()
    ]
    found.append(Check("rate on the device", partial(rate_on_device, device), True))
    found.append(Check("the recipe", partial(the_recipe, device), True))
    run = partial(as_default_device, device)
    return [*found, Check("torch.device as default", run, True)]
