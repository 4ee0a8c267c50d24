"""Checkpoints and the hooks around them."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch

from .row import Contestant, Section
from .training import batches, new_model, plain_path, refused, same, train

SECTION = Section("Checkpoints")
row = SECTION.row


def restored(state: Any) -> Any:
    """Send a state dict through a file that holds no code."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_resumed(make: Contestant, through: Any, **options: Any) -> None:
    """Check that a new optimizer goes on to the bit from the saved state."""
    data = batches(6)
    model = new_model()
    optimizer = make(model)
    head = train(model, optimizer, data[:3])
    saved = through((model.state_dict(), optimizer.state_dict()))
    other = new_model()
    other.load_state_dict(saved[0])
    resumed = make(other, **options)
    resumed.load_state_dict(saved[1])
    tail = train(other, resumed, data[3:])
    same(torch.cat([head, tail]), plain_path(make, data))
    # the saved tensors belong to nobody: the original goes on alike
    same(train(model, optimizer, data[3:]), tail)


@row("`state_dict` of one loads into another and goes on to the bit")
def resumed(make: Contestant) -> None:
    check_resumed(make, copy.deepcopy)


@row("`torch.load(weights_only=True)` is enough")
def weights_only(make: Contestant) -> None:
    check_resumed(make, restored)


@row("Hyperparameters come back with the state")
def hyperparameters(make: Contestant) -> None:
    check_resumed(make, restored, lr=0.7)


@row("A state dict that does not fit is refused and changes nothing")
def misfit(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    head = train(model, optimizer, batches(3))
    alien = torch.nn.Linear(4, 8)
    stranger = make(alien)
    loss = alien(batches(1)[0][0]).square().mean()
    loss.backward()
    stranger.step()
    with refused(ValueError):
        optimizer.load_state_dict(stranger.state_dict())
    tail = train(model, optimizer, batches(6)[3:])
    same(torch.cat([head, tail]), plain_path(make, batches(6)))


@row("`register_state_dict_pre_hook` and `_post_hook`")
def save_hooks(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    calls: list[str] = []

    def replaced(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        calls.append("post")
        return {**state, "note": 7}

    handles = [
        optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre")),
        optimizer.register_state_dict_post_hook(replaced),
    ]
    state = optimizer.state_dict()
    assert calls == ["pre", "post"], calls
    assert state["note"] == 7
    for handle in handles:
        handle.remove()
    assert "note" not in optimizer.state_dict()
    assert calls == ["pre", "post"], calls


@row("`register_load_state_dict_pre_hook` and `_post_hook`")
def load_hooks(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    train(model, optimizer, batches(2))
    state = optimizer.state_dict()
    wanted = copy.deepcopy(state)
    for group in state["param_groups"]:
        group["lr"] = 0.7
    calls: list[Any] = []

    def replaced(_: Any, given: dict[str, Any]) -> dict[str, Any]:
        calls.append(("pre", given["param_groups"][0]["lr"]))
        return wanted

    def after(loaded: Any) -> None:
        calls.append(("post", loaded.param_groups[0]["lr"]))

    optimizer.register_load_state_dict_pre_hook(replaced)
    optimizer.register_load_state_dict_post_hook(after)
    optimizer.load_state_dict(state)
    assert calls == [("pre", 0.7), ("post", 0.05)], calls
