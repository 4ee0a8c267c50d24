"""The training loop around the step."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.optim.swa_utils import AveragedModel, update_bn

from .row import OURS, Contestant, Section
from .training import (
    SIZE,
    Batch,
    batches,
    gradients,
    loss_of,
    mentions,
    new_model,
    params_of,
    plain_path,
    same,
    stray_batch,
    train,
    vector,
)

SECTION = Section("The training loop")
row = SECTION.row

Iteration = Callable[[nn.Module, Any, Batch], None]


def check_loop(make: Contestant, iteration: Iteration, steps: int = 5) -> None:
    """Check that a loop does what the plain one does; the batch size is counted."""
    data, model = batches(steps), new_model()
    optimizer = make(model)
    path = []
    for batch in data:
        iteration(model, optimizer, batch)
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data))


@row("`forward; zero_grad; backward; step`")
def common(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    check_loop(make, iteration)


def clear_model(model: nn.Module, optimizer: Any) -> None:
    """Forget gradients by way of the model."""
    model.zero_grad()


WAYS: dict[str, Callable[[nn.Module, Any], None]] = {
    "`zero_grad()`": lambda model, optimizer: optimizer.zero_grad(),
    "`zero_grad(set_to_none=False)`": lambda model, optimizer: optimizer.zero_grad(
        set_to_none=False
    ),
    "`model.zero_grad()`": clear_model,
}


def add_places() -> None:
    """Add a row for each way and place to forget gradients."""
    for name, clear in WAYS.items():

        @row(f"{name} before forward, before backward, after step")
        def everywhere(
            make: Contestant, clear: Callable[[nn.Module, Any], None] = clear
        ) -> None:
            for place in range(3):

                def iteration(
                    model: nn.Module, optimizer: Any, batch: Batch, place: int = place
                ) -> None:
                    if place == 0:
                        clear(model, optimizer)
                    loss = loss_of(model, batch)
                    if place == 1:
                        clear(model, optimizer)
                    loss.backward()
                    optimizer.step()
                    if place == 2:
                        clear(model, optimizer)

                check_loop(make, iteration)


add_places()


@row("Maximizing is minimizing the negated loss")
def maximize(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    values = []
    for _ in range(10):
        optimizer.zero_grad()
        value = -loss_of(model, batches(1)[0])
        (-value).backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] > 0.8 * values[0], values  # they are negative
    assert values[-1] > values[0] + 0.1, values


@row("`maximize=True`: followed, or refused (negate the loss)")
def maximize_option(make: Contestant) -> None:
    model = new_model()
    try:
        optimizer = make(model, batch_size=SIZE, maximize=True)
    except TypeError as error:
        mentions(error, "maximize")
        return
    gradients(params_of(optimizer), 0)
    optimizer.step()
    found = vector(model)
    twin = new_model()
    optimizer = make(twin, batch_size=SIZE)
    gradients(params_of(optimizer), 0, scale=-1.0)
    optimizer.step()
    assert torch.equal(found, vector(twin))


@row("`clip_grad_norm_` before the step")
def clipping(make: Contestant) -> None:
    model, twin = new_model(), new_model()
    optimizer, other = make(model), make(twin, batch_size=SIZE)
    path, expected = [], []
    for batch in batches(5):
        for net, opt, steps in ((model, optimizer, path), (twin, other, expected)):
            opt.zero_grad()
            loss_of(net, batch).backward()
            grads = [p.grad for p in net.parameters()]
            if net is model:
                nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            else:
                norm = torch.cat([g.flatten() for g in grads]).norm()
                assert norm > 0.11
                for g in grads:
                    g.mul_(0.1 / norm)
            opt.step()
            steps.append(vector(net))
    same(torch.stack(path), torch.stack(expected), tolerance=1e-4)


@row("`register_step_pre_hook` and `_post_hook`, and those of all optimizers")
def step_hooks(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    seen: list[tuple[str, bool]] = []
    start = vector(model)

    def note(name: str) -> Callable[..., None]:
        def hook(found: Any, args: Any, kwargs: Any) -> None:
            assert found is optimizer
            seen.append((name, torch.equal(vector(model), start)))

        return hook

    handles = [
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        register_optimizer_step_post_hook(note("global")),
    ]
    try:
        train(model, optimizer, batches(1))
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [("pre", True), ("post", False), ("global", False)], seen
    train(model, optimizer, batches(1))
    assert len(seen) == 3


@row("A step pre-hook may change the gradients")
def pre_hook_changes(make: Contestant) -> None:
    model, twin = new_model(), new_model()
    optimizer, other = make(model, batch_size=SIZE), make(twin, batch_size=SIZE)

    def halve(opt: Any, args: Any, kwargs: Any) -> None:
        for p in params_of(opt):
            p.grad.mul_(0.5)

    optimizer.register_step_pre_hook(halve)
    path, expected = [], []
    for seed in range(4):
        gradients(params_of(optimizer), seed)
        gradients(params_of(other), seed, scale=0.5)
        optimizer.step()
        other.step()
        path.append(vector(model))
        expected.append(vector(twin))
    same(torch.stack(path), torch.stack(expected))


@row("A closure: followed, or refused before anything moves")
def closure(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    (batch,) = batches(1)

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        return loss

    before = vector(model)
    try:
        loss = optimizer.step(evaluate)
    except NotImplementedError as error:
        mentions(error, "closure")
        expected = before
    else:
        assert loss.item() > 0
        expected = plain_path(make, [batch])[0]
    assert torch.equal(vector(model), expected)


@row("A closure is followed where it is allowed")
def allowed_closure(make: Contestant) -> None:
    data, model = batches(4), new_model()
    optimizer = make(model, **({"allow_closure": True} if make is OURS else {}))
    path = []
    for batch in data:

        def evaluate(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        assert optimizer.step(evaluate).item() > 0
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data))


def count_tensors() -> int:
    """Count the tensors that Python knows; asking proxies for their class may warn."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@row("`backward(create_graph=True)` leaks no graph")
def create_graph(make: Contestant) -> None:
    data, model = batches(5), new_model()
    optimizer = make(model)
    path, tensors = [], []
    for batch in data:
        optimizer.zero_grad()
        out = model(batch[0])
        alive = weakref.ref(out)
        loss = nn.functional.mse_loss(out, batch[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using backward.. with create_graph=True")
            loss.backward(create_graph=True)
        optimizer.step()
        optimizer.zero_grad()  # breaks the cycle of parameter and gradient
        del out, loss
        assert alive() is None, "The graph is still there."
        path.append(vector(model))
        if len(path) in (2, 5):
            tensors.append(count_tensors())
    assert tensors[1] - tensors[0] == 3, tensors  # one of `path` in each step
    for entries in optimizer.state.values():
        for key, tensor in entries.items():
            assert not tensor.requires_grad, key
            assert tensor.grad_fn is None, key
    same(torch.stack(path), plain_path(make, data))


@row("The graph of a forward pass is freed with its loss")
def graph_freed(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    train(model, optimizer, batches(2))
    saved: list[Any] = []

    def note(module: nn.Module, args: Any, output: Tensor) -> None:
        saved.append(StorageWeakRef(output.untyped_storage()))

    handle = model[1].register_forward_hook(note)
    out = model(batches(1)[0][0])
    alive = weakref.ref(out)
    assert not saved[0].expired()  # tanh keeps it for the backward pass
    del out
    handle.remove()
    assert alive() is None, "The output is still there."
    assert saved[0].expired(), "The graph is still there."


@row("A step inside `autocast` equals one outside")
def step_in_autocast(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step()

    check_loop(make, iteration)


@row("`AveragedModel` and `update_bn` beside training")
def averaging(make: Contestant) -> None:
    data, model = batches(5), new_model()
    optimizer = make(model)
    average = AveragedModel(model)
    path = []
    for batch in data:
        path.append(train(model, optimizer, [batch])[0])
        average.update_parameters(model)
        update_bn([stray_batch()[0]], average)
        average(stray_batch()[0]).sum().backward()
    same(torch.stack(path), plain_path(make, data))
    mean = torch.stack(path).mean(0)
    assert torch.allclose(vector(average.module), mean, atol=1e-6)


@row("Two optimizers on parts of one model")
def two_optimizers(make: Contestant) -> None:
    data, model = batches(5), new_model()
    pair = [make(model, params=list(model[i].parameters())) for i in (0, 2)]
    path = []
    for batch in data:
        for optimizer in pair:
            optimizer.zero_grad()
        loss_of(model, batch).backward()
        for optimizer in pair:
            optimizer.step()
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data), make.rounding)


@row("The adversarial loop of DCGAN (`netD.zero_grad()`)")
def adversarial(make: Contestant) -> None:
    paths = []
    for told in ({"batch_size": SIZE}, {}):
        torch.manual_seed(4)
        critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        artist = nn.Linear(2, 4)
        of_critic = make(critic, **{k: 2 * v for k, v in told.items()})
        of_artist = make(artist, **told)
        path = []
        for real, _ in batches(4):
            critic.zero_grad()
            fake = artist(torch.randn(SIZE, 2))
            (-critic(real).mean()).backward()
            critic(fake.detach()).mean().backward()
            of_critic.step()
            artist.zero_grad()
            (-critic(fake).mean()).backward()
            of_artist.step()
            path.append(torch.cat([vector(critic), vector(artist)]))
        paths.append(torch.stack(path))
    same(paths[1], paths[0])
