"""Which examples count as those whose gradients are in `.grad`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from sirfshampoo import SIRFShampoo, recipe

from .loop import check_loop
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
    refused,
    same,
    stray_batch,
    train,
    vector,
)

SECTION = Section("Batch size: the examples in `.grad`")
row = SECTION.row


def check_before_step(
    make: Contestant, between: Callable[[nn.Module, Any, Batch], None], when: str
) -> None:
    """Check that something done beside the plain loop leaves no trace.

    Args:
        make: Builds the optimizer.
        between: What is done, with a stray batch.
        when: ``"before zero_grad"`` or ``"before forward"`` or ``"before step"``.
    """

    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        if when == "before zero_grad":
            between(model, optimizer, stray_batch())
        optimizer.zero_grad()
        if when == "before forward":
            between(model, optimizer, stray_batch())
        loss_of(model, batch).backward()
        if when == "before step":
            between(model, optimizer, stray_batch())
        optimizer.step()

    check_loop(make, iteration)


def forward_alone(model: nn.Module, optimizer: Any, batch: Batch) -> None:
    """Predict in training mode, and forget it."""
    loss_of(model, batch)


@row("A forward pass without backward does not count")
def discarded_forward(make: Contestant) -> None:
    for when in ("before zero_grad", "before forward", "before step"):
        check_before_step(make, forward_alone, when)


@row("A batch discarded by `zero_grad()` does not count")
def discarded_backward(make: Contestant) -> None:
    def discard(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        loss_of(model, batch).backward()
        optimizer.zero_grad()

    for when in ("before zero_grad", "before forward"):
        check_before_step(make, discard, when)


@row("A batch discarded by `zero_grad(set_to_none=False)` does not count")
def discarded_to_zero(make: Contestant) -> None:
    for by_model in (False, True):

        def discard(
            model: nn.Module, optimizer: Any, batch: Batch, by_model: bool = by_model
        ) -> None:
            loss_of(model, batch).backward()
            (model if by_model else optimizer).zero_grad(set_to_none=False)

        check_before_step(make, discard, "before forward")


@row("A batch discarded by `model.zero_grad()` does not count")
def discarded_by_model(make: Contestant) -> None:
    def discard(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        loss_of(model, batch).backward()
        model.zero_grad()

    check_before_step(make, discard, "before forward")


@row("Discarded by `model.zero_grad()` between forward and backward")
def discarded_by_model_late(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        loss_of(model, stray_batch()).backward()
        loss = loss_of(model, batch)
        model.zero_grad()
        loss.backward()
        optimizer.step()

    check_loop(make, iteration)


@row("A forward pass under `no_grad` or `inference_mode` does not count")
def without_gradients(make: Contestant) -> None:
    for mode in (torch.no_grad, torch.inference_mode):

        def validate(
            model: nn.Module, optimizer: Any, batch: Batch, mode: Any = mode
        ) -> None:
            with mode():
                loss_of(model, batch)

        for when in ("before zero_grad", "before forward", "before step"):
            check_before_step(make, validate, when)


@row("Validation in evaluation mode does not count")
def validation(make: Contestant) -> None:
    def validate(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        model.eval()
        loss_of(model, batch)
        model.train()

    for when in ("before forward", "before step"):
        check_before_step(make, validate, when)


@row("`autograd.grad` with respect to inputs does not count")
def input_gradients(make: Contestant) -> None:
    def look(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        x = batch[0].clone().requires_grad_()
        torch.autograd.grad(loss_of(model, (x, batch[1])), x)

    for when in ("before forward", "before step"):
        check_before_step(make, look, when)


@row("Gradients by `autograd.grad`, put into `.grad`")
def put_gradients(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        params = list(model.parameters())
        grads = torch.autograd.grad(loss_of(model, batch), params)
        for p, gradient in zip(params, grads, strict=True):
            p.grad = gradient
        optimizer.step()

    check_loop(make, iteration)


@row("Gradients by `torch.func.grad`: counted, or an error that says how")
def functional_gradients(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        params = {name: p.detach() for name, p in model.named_parameters()}

        def loss(values: dict[str, Tensor]) -> Tensor:
            return loss_of(partial(torch.func.functional_call, model, values), batch)

        for name, gradient in torch.func.grad(loss)(params).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()

    try:
        check_loop(make, iteration)
    except RuntimeError as error:
        mentions(error, "pass 'batch_size' as an integer")


@row("A gradient penalty: both backward passes count once")
def penalty(make: Contestant) -> None:
    paths = []
    for told in ({"batch_size": SIZE}, {}):
        model = new_model()
        optimizer = make(model, **told)
        path = []
        for batch in batches(4):
            x = batch[0].clone().requires_grad_()
            optimizer.zero_grad()
            loss = loss_of(model, (x, batch[1]))
            (slope,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + slope.square().sum()).backward()
            optimizer.step()
            path.append(vector(model))
        paths.append(torch.stack(path))
    same(paths[1], paths[0])


@row("Training in evaluation mode")
def evaluation_mode(make: Contestant) -> None:
    data, model = batches(5), new_model().eval()
    same(train(model, make(model), data), plain_path(make, data))


@row("Micro-batches add up")
def micro_batches(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        optimizer.zero_grad()
        for start, stop in ((0, 1), (1, 3), (3, SIZE)):
            part = (batch[0][start:stop], batch[1][start:stop])
            (loss_of(model, part) * (stop - start) / SIZE).backward()
        optimizer.step()

    data, model = batches(5), new_model()
    optimizer = make(model)
    path = []
    for batch in data:
        iteration(model, optimizer, batch)
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data), tolerance=1e-5)


@row("Several forward passes before one backward add up")
def several_passes(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        x, y = batch
        optimizer.zero_grad()
        out = torch.cat([model(x[:2]), model(x[2:])])
        nn.functional.mse_loss(out, y).backward()
        optimizer.step()

    data, model = batches(5), new_model()
    optimizer = make(model)
    path = []
    for batch in data:
        iteration(model, optimizer, batch)
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data), tolerance=1e-5)


@row("Two losses of one forward pass count once")
def two_losses(make: Contestant) -> None:
    def iteration(model: nn.Module, optimizer: Any, batch: Batch) -> None:
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        (loss / 2).backward(retain_graph=True)
        (loss / 2).backward()
        optimizer.step()

    check_loop(make, iteration)


@row("Batches of different sizes, each with its own")
def different_sizes(make: Contestant) -> None:
    data = [batches(1, size, seed=size)[0] for size in (5, 5, 9, 2, 7)]
    model, twin = new_model(), new_model()
    found = train(model, make(model), data)
    told = iter([len(x) for x, _ in data])
    optimizer = make(twin, batch_size=lambda inputs: next(told))
    same(found, train(twin, optimizer, data))


@row("A step without any forward is an error that says how", only=OURS)
def no_forward(make: Contestant) -> None:
    data, model = batches(4), new_model()
    optimizer = make(model)
    path = []
    for batch in data:
        gradients(params_of(optimizer), 0)
        before = vector(model)
        with refused(RuntimeError, "batch_size", "integer"):
            optimizer.step()
        assert torch.equal(vector(model), before)
        path.append(train(model, optimizer, [batch])[0])
    same(torch.stack(path), plain_path(make, data))


def check_forward(
    make: Contestant, forward: Callable[[nn.Module, Tensor], Tensor], **options: Any
) -> None:
    """Check training with a forward pass that computes what the plain one does."""
    data, model = batches(4), new_model()
    reader = Reader(model)
    optimizer = make(reader, **options)
    found = train(reader, optimizer, data, forward=lambda x: forward(reader, x))
    same(found, plain_path(make, data))


class Reader(nn.Module):
    """A net that takes its input from wherever it is."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        leaves = tree_leaves((args, kwargs))
        return self.net(next(leaf for leaf in leaves if isinstance(leaf, Tensor)))


INPUTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "positional": lambda model, x: model(x, "text", 3),
    "keyword-only": lambda model, x: model(x=x, mask=None),
    "a dict": lambda model, x: model({"x": x, "n": 3}),
    "a tuple": lambda model, x: model((x, None)),
    "a list": lambda model, x: model([x]),
    "nested": lambda model, x: model({"a": [None, (x, 1.0)]}, flag=True),
    "the first argument None": lambda model, x: model(None, x),
}


def add_inputs() -> None:
    """Add a row for each form of input."""
    for form, forward in INPUTS.items():

        @row(f"Inputs: {form}")
        def inputs(
            make: Contestant,
            forward: Callable[[nn.Module, Tensor], Tensor] = forward,
        ) -> None:
            check_forward(make, forward)


add_inputs()


@dataclass
class Prediction:
    """What a model may return."""

    values: Tensor
    note: str


class Wrapping(nn.Module):
    """A net that wraps its prediction up, or computes its loss itself."""

    def __init__(self, net: nn.Module, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.net = net
        self.wrap = wrap

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        values = self.net(x)
        return self.wrap(values if y is None else nn.functional.mse_loss(values, y))


OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "a tuple": (lambda t: (None, t), lambda out: out[1]),
    "a dict": (lambda t: {"n": 1, "t": [t]}, lambda out: out["t"][0]),
    "a dataclass": (lambda t: Prediction(t, ""), lambda out: out.values),
}


def add_outputs() -> None:
    """Add a row for each form of output."""
    for form, (wrap, unwrap) in OUTPUTS.items():

        @row(f"Outputs: {form}")
        def outputs(
            make: Contestant,
            wrap: Callable[[Tensor], Any] = wrap,
            unwrap: Callable[[Any], Tensor] = unwrap,
        ) -> None:
            data = batches(4)
            model = Wrapping(new_model(), wrap)
            found = train(model, make(model), data, lambda x: unwrap(model(x)))
            same(found, plain_path(make, data))


add_outputs()


@row("Outputs: the loss itself")
def loss_output(make: Contestant) -> None:
    data, path = batches(4), []
    model = Wrapping(new_model(), lambda loss: {"loss": loss})
    optimizer = make(model)
    for x, y in data:
        optimizer.zero_grad()
        model(x, y=y)["loss"].backward()
        optimizer.step()
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data))


@row("Outputs: changed in place afterwards")
def changed_output(make: Contestant) -> None:
    data, model = batches(4), new_model()

    def forward(x: Tensor) -> Tensor:
        out = model(x)
        out.mul_(2)
        out[:, 0] += 1
        out[:, 0] -= 1
        return out.div_(2)

    found = train(model, make(model), data, forward)
    same(found, plain_path(make, data), tolerance=1e-5)


class Keeping(nn.Module):
    """A net that keeps its loss and returns what is cut off from the graph."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.net(x)
        self.loss = nn.functional.mse_loss(out, y)
        return out.detach()


@row("Outputs: cut off from the graph, the loss kept in the model")
def kept_loss(make: Contestant) -> None:
    data, path = batches(4), []
    model = Keeping(new_model())
    optimizer = make(model)
    for batch in data:
        optimizer.zero_grad()
        model(*batch)
        model.loss.backward()
        optimizer.step()
        path.append(vector(model))
    same(torch.stack(path), plain_path(make, data))


@row("A `batch_size` callable gets the tuple of positional inputs", only=OURS)
def callable_of_inputs(make: Contestant) -> None:
    seen: list[Any] = []

    def count(inputs: tuple[Any, ...]) -> int:
        seen.append(inputs)
        return SIZE

    check_forward(make, lambda model, x: model(x, 3, flag=True), batch_size=count)
    assert len(seen) == 4
    for inputs, (x, _) in zip(seen, batches(4), strict=True):
        assert isinstance(inputs, tuple)
        assert torch.equal(inputs[0], x)
        assert inputs[1:] == (3,)


@row("A `batch_size` callable of two gets the keyword inputs, too", only=OURS)
def callable_of_keywords(make: Contestant) -> None:
    seen: list[Any] = []

    def count(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        seen.append((args, kwargs))
        return len(kwargs["x"])

    check_forward(make, lambda model, x: model(3, x=x), batch_size=count)
    assert [args for args, _ in seen] == [(3,)] * 4
    for (_, kwargs), (x, _) in zip(seen, batches(4), strict=True):
        assert list(kwargs) == ["x"]
        assert torch.equal(kwargs["x"], x)


class Checkpointed(nn.Module):
    """A net whose inner parts are computed anew in the backward pass."""

    def __init__(self, net: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.net = net
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return checkpoint_sequential(
            self.net, segments=2, input=x, use_reentrant=self.use_reentrant
        )


def add_checkpointing() -> None:
    """Add rows for both kinds of activation checkpointing."""
    for use_reentrant in (False, True):

        @row(f"Activation checkpointing of parts, `use_reentrant={use_reentrant}`")
        def parts(make: Contestant, use_reentrant: bool = use_reentrant) -> None:
            data, net = batches(4), new_model()
            model = Checkpointed(net, use_reentrant)
            same(train(model, make(model), data), plain_path(make, data))

        @row(f"Activation checkpointing of all, `use_reentrant={use_reentrant}`")
        def whole(make: Contestant, use_reentrant: bool = use_reentrant) -> None:
            data, model = batches(4), new_model()

            def forward(x: Tensor) -> Tensor:
                x = x.clone().requires_grad_()
                out = checkpoint(model, x, use_reentrant=use_reentrant)
                assert isinstance(out, Tensor)
                return out

            found = train(model, make(model), data, forward)
            same(found, plain_path(make, data))


add_checkpointing()


COUNTED: dict[str, Callable[[Tensor], Any]] = {
    "Sequences of a `PackedSequence` count, not their elements": lambda x: (
        nn.utils.rnn.pack_sequence([row.unsqueeze(-1) for row in x])
    ),
    "Entries of a list of sequences count": lambda x: [
        row[: i + 1] for i, row in enumerate(x)
    ],
    "Graphs of a batch of graphs count": lambda x: SimpleNamespace(
        num_graphs=len(x), nodes=x.flatten()
    ),
}


def add_counted() -> None:
    """Make a row for each kind of input that tells how many examples it holds."""
    for title, wrapped in COUNTED.items():

        @row(title, only=OURS)
        def counted(
            make: Contestant, wrapped: Callable[[Tensor], Any] = wrapped
        ) -> None:
            data, net = batches(3), new_model()

            class Unwrapping(nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.net = net

                def forward(self, _: Any, x: Tensor) -> Tensor:
                    return self.net(x)

            model = Unwrapping()
            forward = [partial(model, wrapped(x)) for x, *_ in data]
            optimizer, path = make(model), []
            for predict, (x, y, *_) in zip(forward, data, strict=True):
                optimizer.zero_grad()
                nn.functional.mse_loss(predict(x), y).backward()
                optimizer.step()
                path.append(vector(net))
            same(torch.stack(path), plain_path(make, data))


add_counted()


@row("A batch size that the recipe was not told is named, with the remedy", only=OURS)
def disagreement(make: Contestant) -> None:
    data, model = batches(6), new_model()
    arguments = recipe(model, batch_size=10 * SIZE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, SIRFShampoo(model, **arguments), data)
    (warning,) = caught
    assert f"{SIZE} examples" in str(warning.message), warning.message
    assert f"batch_size={10 * SIZE}" in str(warning.message), warning.message
