"""A process that holds optimizers of one package; times their steps on request.

It runs as a script, reads one JSON request a line from standard input and answers
with one JSON line. It imports nothing but torch and whichever `sirfshampoo` its
`PYTHONPATH` leads to: two packages of the same name cannot share a process.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

BATCH_SIZE = 8
GRADIENT_SETS = 4
PACKAGES = ("sirfshampoo", "singd")


class Model(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self, shapes: Mapping[str, Iterable[int]], seed: int = 0) -> None:
        """Draw parameters of the given shapes."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in shapes.items():
            value = torch.randn(*shape, generator=generator).mul_(0.02)
            self.register_parameter(name, nn.Parameter(value))


def gradients(model: nn.Module, seed: int) -> list[Tensor]:
    """Draw one gradient per parameter.

    Its scale, `1/√BATCH_SIZE`, puts the fixed point of the factors near identity:
    the numbers stay ordinary however many steps are timed.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = BATCH_SIZE**-0.5
    return [
        torch.randn(p.shape, generator=generator).mul_(scale)
        for p in model.parameters()
    ]


def build(
    spec: Mapping[str, Any], model: nn.Module, settings: Mapping[str, Any]
) -> Optimizer:
    """Construct the optimizer that `spec` describes."""
    structures = spec["structures"]
    if structures is None:
        return torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=True)
    from sirfshampoo import SIRFShampoo

    if isinstance(structures, dict):  # JSON has no integer keys
        structures = {int(ndim): name for ndim, name in structures.items()}
    optimizer: Optimizer = SIRFShampoo(
        model,
        T=spec["T"],
        batch_size=BATCH_SIZE,
        structures=structures,
        preconditioner_dtypes=getattr(torch, spec["dtype"]),
        **settings,
    )
    return optimizer


def held_tensors(obj: object, seen: set[int]) -> Iterator[Tensor]:
    """Yield all tensors reachable from an optimizer's attributes, caches included."""
    if id(obj) in seen:
        return
    seen.add(id(obj))
    children: Iterable[object] = ()
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, Mapping):
        children = [*obj.keys(), *obj.values()]
    elif isinstance(obj, list | tuple | set | frozenset):
        children = obj
    elif isinstance(obj, Optimizer) or type(obj).__module__.split(".")[0] in PACKAGES:
        slots = getattr(type(obj), "__slots__", ())
        names = [slots] if isinstance(slots, str) else list(slots)
        children = [getattr(obj, name, None) for name in names]
        children += list(getattr(obj, "__dict__", {}).values())
    for child in children:
        yield from held_tensors(child, seen)


def held_bytes(optimizer: Optimizer, model: nn.Module) -> int:
    """Count the bytes an optimizer keeps between steps, each storage once.

    Parameters and their gradients do not count; cached products do.
    """
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in held_tensors(optimizer, set())
    }
    for p in model.parameters():
        for tensor in (p.detach(), p.grad):
            if tensor is not None:
                storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


class Entry:
    """One contestant: its parameters, its optimizer and the gradients it is fed."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        shapes: Mapping[str, Iterable[int]],
        pool: list[list[Tensor]] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Build the contestant; draw a gradient for every step if there is no pool."""
        self.model = Model(shapes)
        self.params = list(self.model.parameters())
        self.optimizer = build(spec, self.model, settings or {})
        self.pool = pool
        self.steps = count()

    def step(self) -> float:
        """Take a step on a fresh gradient.

        Returns:
            Its time in milliseconds.

        Raises:
            RuntimeError: If a parameter did not move, or is no longer finite.
        """
        step = next(self.steps)
        if self.pool is None:
            fresh = gradients(self.model, seed=1 + step)
        else:
            fresh = self.pool[step % len(self.pool)]
        for p, g in zip(self.params, fresh, strict=True):
            p.grad = g.clone()
        before = self._probe()

        start = perf_counter()
        self.optimizer.step()
        elapsed = 1e3 * (perf_counter() - start)

        moved = (self._probe() - before).abs()
        if not bool((moved > 0).all() and moved.isfinite().all()):
            raise RuntimeError("A parameter did not move, or is not finite.")
        return elapsed

    def _probe(self) -> Tensor:
        """Copy one number out of every parameter."""
        return torch.stack([p.detach().view(-1)[-1] for p in self.params])


class Worker:
    """Answers requests; every public method is one."""

    def __init__(self) -> None:
        """Start without contestants."""
        self.entries: dict[str, Entry] = {}
        self.pools: dict[str, list[list[Tensor]]] = {}

    def hello(self, threads: int) -> dict[str, Any]:
        """Set the number of threads; say which packages are in use."""
        torch.set_num_threads(threads)
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        return {"threads": torch.get_num_threads(), "versions": versions}

    def origin(self) -> str:
        """Say where `sirfshampoo` was imported from."""
        import sirfshampoo

        return str(sirfshampoo.__file__)

    def add(
        self, key: str, spec: dict[str, Any], shapes: dict[str, list[int]], warmup: int
    ) -> dict[str, Any]:
        """Build a contestant; take its first steps, untimed."""
        if json.dumps(shapes) not in self.pools:
            model = Model(shapes)
            pool = [gradients(model, seed) for seed in range(GRADIENT_SETS)]
            self.pools[json.dumps(shapes)] = pool
        entry = Entry(spec, shapes, self.pools[json.dumps(shapes)])
        ms = [entry.step() for _ in range(warmup)]
        self.entries[key] = entry
        return {"ms": ms, "bytes": held_bytes(entry.optimizer, entry.model)}

    def turn(self, key: str, steps: int) -> list[float]:
        """Time `steps` steps of a contestant, after one that refills the caches."""
        entry = self.entries[key]
        entry.step()
        return [entry.step() for _ in range(steps)]

    def construct(self, spec: dict[str, Any], shapes: dict[str, list[int]]) -> float:
        """Time the constructor, in seconds."""
        model = Model(shapes)
        start = perf_counter()
        build(spec, model, {})
        return perf_counter() - start

    def follow(
        self,
        spec: dict[str, Any],
        shapes: dict[str, list[int]],
        steps: int,
        settings: dict[str, float],
        path: str,
    ) -> None:
        """Take steps; save how far each parameter moved and what the factors are."""
        entry = Entry(spec, shapes, settings=settings)
        start = [p.detach().clone() for p in entry.params]
        for _ in range(steps):
            entry.step()
        moves = [p.detach() - s for p, s in zip(entry.params, start, strict=True)]
        units: Any = entry.optimizer.preconditioner  # type: ignore[attr-defined]
        factors = [K.to_dense().clone() for unit in units for K in unit]
        torch.save({"moves": moves, "factors": factors}, path)

    def roof(self) -> dict[str, float]:
        """Measure the rates of matrix products (Gflop/s) and of copying (GB/s)."""
        rates: dict[str, float] = {}
        for dtype in (torch.float32, torch.bfloat16):
            for m, n, k in ((1024, 1024, 1024), (1024, 256, 256), (256, 256, 256)):
                a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
                out = torch.empty(m, n, dtype=dtype)
                seconds = _seconds(torch.mm, a, b, out=out)
                name = f"{dtype} {m}x{k} @ {k}x{n} Gflop/s".removeprefix("torch.")
                rates[name] = 2 * m * n * k / seconds / 1e9
        source = torch.randn(2**24)
        seconds = _seconds(torch.empty_like(source).copy_, source)
        rates["copy of 64 MiB, read + written, GB/s"] = (
            2 * source.nbytes / seconds / 1e9
        )
        return rates


def _seconds(function: Any, *args: Any, **kwargs: Any) -> float:
    """Return the median time of a few calls, after one that is not timed."""
    times = []
    for _ in range(8):
        start = perf_counter()
        function(*args, **kwargs)
        times.append(perf_counter() - start)
    return median(times[1:])


def main() -> None:
    """Serve requests until standard input ends."""
    # What a package prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            result = {"result": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # told to the driver, which decides
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(result), file=answers, flush=True)


if __name__ == "__main__":
    main()
