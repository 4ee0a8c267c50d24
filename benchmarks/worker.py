"""A process that holds optimizers of one package; times their steps on request.

It imports whichever `sirfshampoo` lies in its folder: two packages of the same name
cannot share a process.
"""

import os
import sys
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.contestants import BATCH_SIZE
from benchmarks.gpu.clock import copy_rate, product_rate
from benchmarks.memory import Peak, held_bytes
from benchmarks.optimizers import build, translated
from benchmarks.processes import FRESH, Process
from benchmarks.workloads import Shapes

GRADIENT_SETS = 4
COPY = "copy of 64 MiB, read + written, GB/s"
PACKAGES = ("sirfshampoo", "singd", "pytorch-optimizer", "heavyball")


class Model(nn.Module):
    """Parameters without a forward pass."""

    def __init__(self, shapes: Mapping[str, Iterable[int]]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
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


class Entry:
    """A network without a forward pass, its optimizers, and what they are fed.

    Attributes:
        takes: What takes a step, one after the other.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[Optimizer],
        pool: list[list[Tensor]] | None = None,
    ) -> None:
        """Draw a gradient for every step if there is no pool of gradients."""
        self.model, self.optimizers, self.pool = model, optimizers, pool
        self.params = list(model.parameters())
        self.takes = [optimizer.step for optimizer in optimizers]
        self.steps = count()

    def feed(self) -> None:
        """Give every parameter a fresh gradient, whatever became of the last one."""
        step = next(self.steps)
        if self.pool is None:
            fresh = gradients(self.model, seed=1 + step)
        else:
            fresh = self.pool[step % len(self.pool)]
        for p, g in zip(self.params, fresh, strict=True):
            p.grad = g.clone()

    def step(self) -> float:
        """Take a step on a fresh gradient; return its time in milliseconds."""
        self.feed()
        start = perf_counter()
        for take in self.takes:
            take()
        return 1e3 * (perf_counter() - start)

    def checked_step(self) -> float:
        """Take a step, and look at the parameters before and after.

        Raises:
            RuntimeError: If a parameter did not move, or is no longer finite.
        """
        before = self._probe()
        elapsed = self.step()
        moved = (self._probe() - before).abs().amax(1)
        if not bool((moved > 0).all() and moved.isfinite().all()):
            raise RuntimeError("A parameter did not move, or is not finite.")
        return elapsed

    def peak(self, steps: int) -> int | None:
        """Return how many bytes a step takes for itself at most; `None` if unknown."""
        found = []
        for _ in range(steps):
            self.feed()
            with Peak() as peak:
                for take in self.takes:
                    take()
            found.append(peak.bytes)
        return max((bytes for bytes in found if bytes is not None), default=None)

    def _probe(self) -> Tensor:
        """Copy three numbers out of every parameter: one may rest by chance."""
        flat = [p.detach().view(-1) for p in self.params]
        looked_at = [p[i] for p in flat for i in (0, len(p) // 2, -1)]
        return torch.stack(looked_at).view(-1, 3)


Spec = Mapping[str, Any]
"""What `Contestant.spec` returns: a builder and its settings."""


class Answers:
    """Answers requests; every public method is one."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}
        self.pools: dict[tuple[Any, ...], list[list[Tensor]]] = {}

    def origin(self, package: str) -> str:
        """Say where a package was imported from."""
        return str(import_module(package).__file__)

    def versions(self) -> dict[str, str]:
        """Say which packages are in use."""
        found = {}
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
        return found

    def add(
        self, key: str, spec: Spec, shapes: Shapes, warmup: int, peak: int = 0
    ) -> dict[str, Any]:
        """Build a contestant; take its first steps, and `peak` that measure memory.

        Some optimizers wait for their first factors, and move nothing until then: only
        the last step of the warm-up is checked.
        """
        model, of_shapes = Model(shapes), tuple(shapes.items())
        if of_shapes not in self.pools:
            pool = [gradients(model, seed) for seed in range(GRADIENT_SETS)]
            self.pools[of_shapes] = pool
        entry = Entry(model, build(model=model, **spec), self.pools[of_shapes])
        ms = [entry.step() for _ in range(warmup - 1)] + [entry.checked_step()]
        self.entries[key] = entry
        held = held_bytes(entry.optimizers, model)
        return {"ms": ms, "bytes": held, "peak": entry.peak(peak)}

    def turn(self, key: str, steps: int) -> list[float]:
        """Time `steps` steps of a contestant, after one that refills the caches."""
        entry = self.entries[key]
        entry.checked_step()
        return [entry.checked_step() for _ in range(steps)]

    def construct(self, spec: Spec, shapes: Shapes) -> float:
        """Time the constructor, in seconds."""
        model = Model(shapes)
        start = perf_counter()
        build(model=model, **spec)
        return perf_counter() - start

    def follow(self, spec: Spec, shapes: Shapes, steps: int) -> dict[str, list[Any]]:
        """Take steps; return how far each parameter moved and what the factors are."""
        model = Model(shapes)
        entry = Entry(model, build(model=model, **spec))
        start = [p.detach().clone() for p in entry.params]
        for _ in range(steps):
            entry.checked_step()
        moves = [p.detach() - s for p, s in zip(entry.params, start, strict=True)]
        optimizer: Any = entry.optimizers[0]
        factors = [K.to_dense() for unit in optimizer.preconditioner for K in unit]
        found = {"moves": moves, "factors": factors}
        return {name: [t.numpy() for t in tensors] for name, tensors in found.items()}

    def work(self, spec: Spec, shapes: Shapes) -> dict[str, Any]:
        """Count what a step of `SIRFShampoo` has to do, from shapes alone.

        Returns:
            `"flops"`, the mean over the steps from one update of the factors to the
            next; `"bytes"`, likewise, if all factors are diagonal, else `None`.
        """
        from sirfshampoo import summary

        rows = summary(Model(shapes), **translated(spec["settings"])).rows
        T = spec["settings"]["T"]
        flops = sum(row.update_flops / T + row.step_flops for row in rows)
        elementwise = {name for row in rows for name in row.structures} <= {"diagonal"}
        return {
            "flops": flops,
            "bytes": sum(_least_bytes(r, T) for r in rows) if elementwise else None,
        }

    def roof(
        self, products: list[tuple[int, int, int]], dtypes: list[str]
    ) -> dict[str, dict[str, float]]:
        """Measure the machine's own rates.

        Args:
            products: What the workload mostly multiplies: number, rows and columns as
                `largest_products` returns them.
            dtypes: In which types.

        Returns:
            `"machine"`: rates of ordinary matrix products (Gflop/s) and of copying
            (GB/s). `"products"`: rates of the workload's own, batched.
        """
        machine: dict[str, float] = {}
        for dtype in ("float32", "bfloat16"):
            for m, n, k in ((1024, 1024, 1024), (1024, 256, 256), (256, 256, 256)):
                name = f"{dtype} {m}x{k} @ {k}x{n} Gflop/s"
                machine[name] = product_rate(1, m, k, n, dtype, "cpu")
        machine[COPY] = copy_rate(2**24, "cpu")
        own = {
            f"{dtype} {number} of {d}x{d} @ {d}x{columns}": product_rate(
                number, d, d, columns, dtype, "cpu"
            )
            for dtype in dtypes
            for number, d, columns in products
        }
        return {"machine": machine, "products": own}


def _least_bytes(row: Any, T: int) -> float:
    """Return the least bytes that a step with diagonal factors moves.

    An update reads the gradient and each factor with its momentum, and writes these. A
    step reads the gradient, the factors and the parameter, and writes this; it reads
    and writes the momentum.
    """
    gradient = 4 * row.parameters
    update = gradient + 2 * row.factor_bytes
    always = 3 * gradient + row.factor_bytes + 2 * row.momentum_bytes
    return float(update / T + always)


def _serve(connection: Connection, _: None) -> None:
    """Answer as long as somebody asks; an error is an answer, too."""
    answers = Answers()
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("result", getattr(answers, method)(**arguments)))
        except Exception as error:  # told to the driver, which decides
            connection.send(("error", f"{type(error).__name__}: {error}"))


class Worker(Process):
    """The driver's side: a process that sees one package called `sirfshampoo`."""

    def __init__(
        self, folder: Path, threads: int, package: str = "sirfshampoo"
    ) -> None:
        """Start the process.

        Args:
            folder: Where it finds what it measures, before all other places.
            threads: How many threads it uses.
            package: The import name of what it measures.
        """
        # the process inherits the path: torch looks for opt_einsum as it is imported
        path = patch.object(sys, "path", [str(folder), *sys.path])
        with path, patch.dict(os.environ, OMP_NUM_THREADS=str(threads)):
            super().__init__(_serve, None, threads=threads, context=FRESH)
        try:
            origin = Path(self.call("origin", package=package)).resolve()
            if folder.resolve() not in origin.parents:
                raise RuntimeError(f"{package} was imported from elsewhere.")
        except BaseException:
            self.close()
            raise

    def call(self, method: str, **arguments: Any) -> Any:
        """Have a method of `Answers` called; return what it returns.

        Raises:
            WorkFailed: If it raised, or the process ended.
        """
        return self.ask((method, arguments))
