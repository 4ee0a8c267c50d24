"""Models that `torch.compile` has compiled."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from .row import Contestant, Section
from .training import (
    SIZE,
    batches,
    new_model,
    plain_path,
    same,
    stray_batch,
    train,
    vector,
)

SECTION = Section("Compiled, exported and converted models")
row = SECTION.row


class Net(nn.Module):
    """A root that is no `nn.Sequential`."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = new_model() if net is None else net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Start and end with nothing compiled."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        # torch looks for gradients of what crosses a graph break, and hides the
        # warning of it by a means that comes too late for warnings that are errors
        warnings.filterwarnings("ignore", r"The \.grad attribute of a Tensor")
        try:
            yield
        finally:
            torch._dynamo.reset()


def check_compiled(
    make: Contestant,
    build: Callable[[Contestant, nn.Module, Any], tuple[Any, Any]],
    model: nn.Module,
) -> None:
    """Check that training is that of the plain loop, and compiles in its first steps.

    Args:
        make: Builds the optimizer.
        build: Returns what is called to predict, and the optimizer.
        model: The net.
    """
    counter = CompileCounter()
    data = batches(8)
    with fresh_compiler():
        forward, optimizer = build(make, model, counter)
        path = [train(model, optimizer, data[:3], forward)]
        compiled = counter.frame_count
        assert compiled, "Nothing was compiled."
        with torch.compiler.set_stance("fail_on_recompile"):
            path.append(train(model, optimizer, data[3:], forward))
        assert counter.frame_count == compiled
    same(torch.cat(path), plain_path(make, data))


def before(make: Contestant, model: nn.Module, backend: Any) -> tuple[Any, Any]:
    """Compile, then give the compiled model to the optimizer."""
    forward = torch.compile(model, backend=backend)
    return forward, make(forward)


def after(make: Contestant, model: nn.Module, backend: Any) -> tuple[Any, Any]:
    """Give the model to the optimizer, then compile it."""
    optimizer = make(model)
    return torch.compile(model, backend=backend), optimizer


def beside(make: Contestant, model: nn.Module, backend: Any) -> tuple[Any, Any]:
    """Compile, then give the original to the optimizer."""
    forward = torch.compile(model, backend=backend)
    return forward, make(model)


def in_place(make: Contestant, model: nn.Module, backend: Any) -> tuple[Any, Any]:
    """Let the model compile itself."""
    optimizer = make(model)
    model.compile(backend=backend)
    return model, optimizer


WAYS = {
    "compiled before construction": before,
    "compiled after construction": after,
    "compiled, the optimizer gets the original": beside,
    "`model.compile()` in place": in_place,
}
ROOTS: dict[str, Callable[[], nn.Module]] = {
    "own module": Net,
    "`nn.Sequential`": new_model,
}


def add_ways() -> None:
    """Add a row for each way of compiling and each root."""
    for way, build in WAYS.items():
        for root, model in ROOTS.items():
            if build is in_place and model is not Net:
                continue  # torch itself compiles nothing there

            @row(f"`torch.compile`: {root}, {way}")
            def compiled(
                make: Contestant, build: Any = build, model: Any = model
            ) -> None:
                check_compiled(make, build, model())


add_ways()


@row('`torch.compile(backend="aot_eager")`')
def aot_eager(make: Contestant) -> None:
    data, model = batches(5), new_model()
    optimizer = make(model)
    with fresh_compiler():
        forward = torch.compile(model, backend="aot_eager")
        found = train(model, optimizer, data, forward)
    same(found, plain_path(make, data), tolerance=1e-5)


@row("`torch.compile` of a submodule alone")
def submodule(make: Contestant) -> None:
    def build(make: Contestant, model: Any, backend: Any) -> tuple[Any, Any]:
        optimizer = make(model)
        model.net.compile(backend=backend)
        return model, optimizer

    check_compiled(make, build, Net(Net()))


@row("`torch.compile(dynamic=True)`, training and evaluation in turn")
def dynamic(make: Contestant) -> None:
    counter = CompileCounter()
    data = [batches(1, size, seed=size)[0] for size in (5, 5, 9, 2, 7, 3, 11, 4)]
    model, twin = new_model(), new_model()
    optimizer = make(model)
    forward = torch.compile(model, backend=counter, dynamic=True)
    path, compiled = [], []
    with fresh_compiler():
        for batch in data:
            model.eval()
            with torch.no_grad():
                forward(stray_batch()[0])
            model.train()
            path.append(train(model, optimizer, [batch], forward)[0])
            compiled.append(counter.frame_count)
    assert compiled[3] == compiled[-1] > 0, compiled
    told = iter([len(x) for x, _ in data])
    other = make(twin, batch_size=lambda inputs: next(told))
    same(torch.stack(path), train(twin, other, data), tolerance=1e-5)


@row("`torch.compile`: a discarded forward pass does not count")
def discarded(make: Contestant) -> None:
    data, model = batches(5), new_model()
    optimizer = make(model)
    forward = torch.compile(model, backend="eager")
    path = []
    with fresh_compiler():
        for batch in data:
            forward(stray_batch()[0])
            path.append(train(model, optimizer, [batch], forward)[0])
    same(torch.stack(path), plain_path(make, data), tolerance=1e-5)


@row("`torch.export` while the optimizer lives")
def exported(make: Contestant) -> None:
    data, model = batches(4), new_model()
    optimizer = make(model)
    path = [train(model, optimizer, data[:2])]
    with fresh_compiler():
        program = torch.export.export(model, (stray_batch()[0],))
    with torch.no_grad():
        x = stray_batch()[0]
        assert torch.equal(program.module()(x), model(x))
    path.append(train(model, optimizer, data[2:]))
    same(torch.cat(path), plain_path(make, data))


@row("`torch.fx.symbolic_trace` while the optimizer lives")
def traced(make: Contestant) -> None:
    data, model = batches(4), Net()
    optimizer = make(model)
    path = [train(model, optimizer, data[:2])]
    graph = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        x = stray_batch()[0]
        assert torch.equal(graph(x), model(x))
    path.append(train(model, optimizer, data[2:]))
    same(torch.cat(path), plain_path(make, data))


def check_converted(make: Contestant, convert: Callable[[nn.Module], Any]) -> None:
    """Check that converting after construction equals converting before."""
    paths = []
    for early in (True, False):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Tanh(), nn.Conv2d(5, 2, 2))
        if early:
            convert(model)
        optimizer = make(model)
        if not early:
            convert(model)
        path = []
        x = torch.randn(SIZE, 3, 4, 4, generator=torch.Generator().manual_seed(2))
        for _ in range(4):
            optimizer.zero_grad()
            model(x.to(model[0].weight)).square().mean().backward()
            optimizer.step()
            path.append(vector(model))
        paths.append(torch.stack(path))
    same(paths[1], paths[0], tolerance=1e-5)


@row("`model.double()` after construction")
def doubled(make: Contestant) -> None:
    check_converted(make, lambda model: model.double())


@row("`model.to(memory_format=torch.channels_last)` after construction")
def laid_out(make: Contestant) -> None:
    check_converted(make, lambda model: model.to(memory_format=torch.channels_last))


@row("`torch.compile(fullgraph=True)`")
def fullgraph(make: Contestant) -> None:
    def build(make: Contestant, model: Any, backend: Any) -> tuple[Any, Any]:
        optimizer = make(model)
        return torch.compile(model, backend=backend, fullgraph=True), optimizer

    check_compiled(make, build, new_model())
