"""Copies, pickles, and what is left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import vector_to_parameters
from torch.optim.lr_scheduler import StepLR

from .row import OURS, Contestant, Section
from .training import (
    SIZE,
    batches,
    loss_of,
    new_model,
    params_of,
    plain_path,
    same,
    stray_batch,
    train,
    train_by_hand,
    vector,
)

SECTION = Section("Copies, pickles, memory")
row = SECTION.row


def by_pickle(value: Any) -> Any:
    """Copy by way of bytes."""
    return pickle.loads(pickle.dumps(value))


def by_torch_save(value: Any) -> Any:
    """Copy by way of a file."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def check_pair(make: Contestant, duplicate: Callable[[Any], Any], patch: bool) -> None:
    """Check that a copy of model and optimizer goes on as the original does."""
    data = batches(6)
    model = new_model()
    optimizer = make(model)
    if patch:
        StepLR(optimizer, 100)
    train(model, optimizer, data[:3])
    model_copy, optimizer_copy = duplicate((model, optimizer))
    before = vector(model)
    found = train(model_copy, optimizer_copy, data[3:])
    assert torch.equal(vector(model), before), "The copy moved the original."
    same(found, train(model, optimizer, data[3:]))


@row("`deepcopy((model, optimizer))` goes on like the original")
def deepcopy_pair(make: Contestant) -> None:
    check_pair(make, copy.deepcopy, patch=False)


@row("`pickle` of `(model, optimizer)` goes on like the original")
def pickle_pair(make: Contestant) -> None:
    check_pair(make, by_pickle, patch=False)


@row("`deepcopy` after a scheduler patched `step`")
def deepcopy_patched(make: Contestant) -> None:
    check_pair(make, copy.deepcopy, patch=True)


@row("`pickle` after a scheduler patched `step`")
def pickle_patched(make: Contestant) -> None:
    check_pair(make, by_pickle, patch=True)


@row("`deepcopy` of model, optimizer and scheduler")
def deepcopy_with_scheduler(make: Contestant) -> None:
    data = batches(6)
    model = new_model()
    optimizer = make(model)
    scheduler = StepLR(optimizer, 2, gamma=0.5)

    def go_on(model: nn.Module, optimizer: Any, scheduler: Any) -> torch.Tensor:
        path = []
        for batch in data:
            path.append(train(model, optimizer, [batch])[0])
            scheduler.step()
        return torch.stack(path)

    go_on(model, optimizer, scheduler)
    duplicate = copy.deepcopy((model, optimizer, scheduler))
    before = vector(model)
    found = go_on(*duplicate)
    assert torch.equal(vector(model), before), "The copy moved the original."
    same(found, go_on(model, optimizer, scheduler))
    for group in (*optimizer.param_groups, *duplicate[1].param_groups):
        assert abs(group["lr"] - 0.05 * 0.5**6) < 1e-12


def check_alone(make: Contestant, duplicate: Callable[[Any], Any]) -> None:
    """Check that a copy of the optimizer alone works on copies of the parameters."""
    model = new_model()
    optimizer = make(model, batch_size=SIZE)
    train_by_hand(optimizer, params_of(optimizer), range(3))
    other = duplicate(optimizer)
    originals, copies = params_of(optimizer), params_of(other)
    assert not {id(p) for p in originals} & {id(p) for p in copies}
    before = vector(originals)
    found = train_by_hand(other, copies, range(3, 6))
    assert torch.equal(vector(originals), before), "The copy moved the original."
    same(found, train_by_hand(optimizer, originals, range(3, 6)))


@row("`deepcopy(optimizer)` steps parameters of its own")
def deepcopy_alone(make: Contestant) -> None:
    check_alone(make, copy.deepcopy)


@row("`pickle` of the optimizer steps parameters of its own")
def pickle_alone(make: Contestant) -> None:
    check_alone(make, by_pickle)


@row("`pickle` of an optimizer that counts examples", only=OURS)
def pickle_counting(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    train(model, optimizer, batches(3))
    other = by_pickle(optimizer)
    states = optimizer.state_dict(), other.state_dict()
    for p, entries in states[0]["state"].items():
        for key, tensor in entries.items():
            assert torch.equal(states[1]["state"][p][key], tensor), (p, key)
    assert other.global_step == 3


def check_model(
    make: Contestant, duplicate: Callable[[Any], Any], **options: Any
) -> None:
    """Check a copy of the model alone, and that it does not disturb the original."""
    data = batches(5)
    model = new_model()
    optimizer = make(model, **options)
    path = [train(model, optimizer, data[:2])]
    other = duplicate(model)
    assert torch.equal(vector(other), vector(model))
    with torch.no_grad():
        assert torch.equal(other(data[0][0]), model(data[0][0]))
    loss_of(other, stray_batch()).backward()
    path.append(train(model, optimizer, data[2:]))
    same(torch.cat(path), plain_path(make, data))
    # the copy can be trained from where the original was
    twin = new_model()
    vector_to_parameters(path[0][-1].float(), twin.parameters())
    expected = train(twin, make(twin, batch_size=SIZE), data)
    same(train(other, make(other, **options), data), expected)


@row("`deepcopy(model)` after construction, then trained")
def deepcopy_model(make: Contestant) -> None:
    check_model(make, copy.deepcopy)


@row("`pickle` of the model after construction, then trained")
def pickle_model(make: Contestant) -> None:
    check_model(make, by_pickle)


@row("`torch.save(model)` and `torch.load`, then trained")
def save_model(make: Contestant) -> None:
    check_model(make, by_torch_save)


@row("`torch.save(model)` with a lambda as `batch_size`", only=OURS)
def save_model_with_lambda(make: Contestant) -> None:
    check_model(make, by_torch_save, batch_size=lambda inputs: len(inputs[0]))


@row("`model.state_dict()` has the same keys after construction")
def model_state(make: Contestant) -> None:
    model = new_model()
    before = list(model.state_dict())
    optimizer = make(model)
    train(model, optimizer, batches(1))
    assert list(model.state_dict()) == before
    twin = new_model()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(vector(twin), vector(model))


@row("A copy's passes amid a step do not count for the original")
def copy_amid_step(make: Contestant) -> None:
    data = batches(4)
    model = new_model()
    optimizer = make(model)
    pair = copy.deepcopy((model, optimizer))
    path = []
    for batch in data:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        train(*pair, [stray_batch()])
        loss.backward()
        loss_of(copy.deepcopy(model), stray_batch()).backward()
        optimizer.step()
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data))


@row("`del optimizer` frees its memory while the model lives")
def deletion(make: Contestant) -> None:
    model = new_model()
    optimizer = make(model)
    train(model, optimizer, batches(2))
    tensors = [t for entries in optimizer.state.values() for t in entries.values()]
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    assert len(storages) >= 8
    alive = weakref.ref(optimizer)
    del optimizer, tensors
    gc.collect()
    assert alive() is None, "The optimizer is still there."
    left = sum(not storage.expired() for storage in storages)
    assert not left, f"{left} of {len(storages)} state tensors are still there."
    loss_of(model, batches(1)[0]).backward()  # the model goes on


def count_hooks(model: nn.Module) -> int:
    """Count the hooks on the modules and parameters of a model."""
    owners = [*model.modules(), *model.parameters()]
    tables = [
        table
        for owner in owners
        for name, table in vars(owner).items()
        if name.endswith(("_hooks", "_hooks_with_kwargs"))
    ]
    tables += [p._post_accumulate_grad_hooks for p in model.parameters()]
    tables += [p._backward_hooks for p in model.parameters()]
    return sum(len(table) for table in tables if table)


@row("100 optimizers on one model leave no pile of hooks")
def many_optimizers(make: Contestant) -> None:
    model = new_model()
    clean = count_hooks(model)
    optimizer = make(model)
    with_one = count_hooks(model)
    for _ in range(100):
        optimizer = make(model)
    train(model, optimizer, batches(1))
    gc.collect()
    assert count_hooks(model) == with_one
    del optimizer
    gc.collect()
    assert count_hooks(model) == clean
