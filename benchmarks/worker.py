"""A process that holds optimizers of one package; times their steps on request.

It runs as a script, reads one JSON request a line from standard input and answers
with one JSON line. It imports whichever `sirfshampoo` comes first on its `PYTHONPATH`:
two packages of the same name cannot share a process.
"""

import json
import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import copy_rate, product_rate
from benchmarks.memory import Peak, held_bytes
from benchmarks.optimizers import BATCH_SIZE, build, sirfshampoo_options

GRADIENT_SETS = 4
COPY = "copy of 64 MiB, read + written, GB/s"
PACKAGES = ("sirfshampoo", "singd", "pytorch-optimizer", "heavyball")


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
        torch.randn(p.shape, generator=generator).mul_(scale).to(p.device)
        for p in model.parameters()
    ]


class Entry:
    """One contestant: its parameters, its optimizer and the gradients it is fed."""

    def __init__(
        self,
        spec: Mapping[str, Any],
        shapes: Mapping[str, Iterable[int]],
        pool: list[list[Tensor]] | None = None,
        settings: Mapping[str, Any] | None = None,
        device: str = "cpu",
    ) -> None:
        """Build the contestant; draw a gradient for every step if there is no pool."""
        self.model = Model(shapes).to(device)
        self.params = list(self.model.parameters())
        self.optimizer = build(spec, self.model, settings or {})
        self.pool = pool
        self.device = device
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

    def step(self, check: bool = True) -> float:
        """Take a step on a fresh gradient.

        Args:
            check: Whether to look at the parameters before and after. Some optimizers
                wait for their first factors, and move nothing until then.

        Returns:
            Its time in milliseconds.

        Raises:
            RuntimeError: If a parameter did not move, or is no longer finite.
        """
        self.feed()
        before = self._probe()

        start = self._now()
        self.optimizer.step()
        elapsed = 1e3 * (self._now() - start)

        moved = (self._probe() - before).abs().amax(1)
        if check and not bool((moved > 0).all() and moved.isfinite().all()):
            raise RuntimeError("A parameter did not move, or is not finite.")
        return elapsed

    def peak(self, steps: int) -> int | None:
        """Return how many bytes a step takes for itself at most; `None` if unknown."""
        found = []
        for _ in range(steps):
            self.feed()
            with Peak(self.device) as peak:
                self.optimizer.step()
                self._now()
            found.append(peak.bytes)
        known = [bytes for bytes in found if bytes is not None]
        return max(known, default=None)

    def _now(self) -> float:
        """Return the time at which all work that was asked for is done."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        return perf_counter()

    def _probe(self) -> Tensor:
        """Copy three numbers out of every parameter: one may rest by chance."""
        flat = [p.detach().view(-1) for p in self.params]
        looked_at = [p[i] for p in flat for i in (0, len(p) // 2, -1)]
        return torch.stack(looked_at).view(-1, 3)


class Worker:
    """Answers requests; every public method is one."""

    def __init__(self) -> None:
        """Start without contestants."""
        self.entries: dict[str, Entry] = {}
        self.pools: dict[str, list[list[Tensor]]] = {}
        self.device = "cpu"

    def hello(self, threads: int, device: str) -> dict[str, Any]:
        """Set the number of threads and the device; say which packages are in use."""
        torch.set_num_threads(threads)
        self.device = device
        versions = {}
        for name in PACKAGES:
            try:
                versions[name] = version(name)
            except PackageNotFoundError:
                continue
        return {"threads": torch.get_num_threads(), "versions": versions}

    def origin(self, package: str) -> str:
        """Say where a package was imported from."""
        return str(import_module(package).__file__)

    def add(
        self,
        key: str,
        spec: dict[str, Any],
        shapes: dict[str, list[int]],
        warmup: int,
        peak: int = 0,
    ) -> dict[str, Any]:
        """Build a contestant; take its first steps, and `peak` that measure memory."""
        if json.dumps(shapes) not in self.pools:
            model = Model(shapes).to(self.device)
            pool = [gradients(model, seed) for seed in range(GRADIENT_SETS)]
            self.pools[json.dumps(shapes)] = pool
        pool = self.pools[json.dumps(shapes)]
        entry = Entry(spec, shapes, pool, device=self.device)
        ms = [entry.step(check=i == warmup - 1) for i in range(warmup)]
        self.entries[key] = entry
        return {
            "ms": ms,
            "bytes": held_bytes(entry.optimizer, entry.model),
            "peak": entry.peak(peak),
        }

    def turn(self, key: str, steps: int) -> list[float]:
        """Time `steps` steps of a contestant, after one that refills the caches."""
        entry = self.entries[key]
        entry.step()
        return [entry.step() for _ in range(steps)]

    def construct(self, spec: dict[str, Any], shapes: dict[str, list[int]]) -> float:
        """Time the constructor, in seconds."""
        model = Model(shapes).to(self.device)
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
        entry = Entry(spec, shapes, settings=settings, device=self.device)
        start = [p.detach().clone() for p in entry.params]
        for _ in range(steps):
            entry.step()
        moves = [p.detach() - s for p, s in zip(entry.params, start, strict=True)]
        optimizer: Any = entry.optimizer
        factors = [
            K.to_dense().clone() for unit in optimizer.preconditioner for K in unit
        ]
        moves, factors = ([t.cpu() for t in x] for x in (moves, factors))
        torch.save({"moves": moves, "factors": factors}, path)

    def work(self, spec: dict[str, Any], shapes: dict[str, list[int]]) -> Any:
        """Count what a step of `SIRFShampoo` has to do, from shapes alone.

        Returns:
            `"flops"`, the mean over the steps from one update of the factors to the
            next; `"bytes"`, likewise, if all factors are diagonal, else `None`.
        """
        from sirfshampoo import summary

        rows = summary(Model(shapes), **sirfshampoo_options(spec)).rows
        T = spec["T"]
        flops = sum(row.update_flops / T + row.step_flops for row in rows)
        elementwise = {name for row in rows for name in row.structures} <= {"diagonal"}
        return {
            "flops": flops,
            "bytes": sum(_least_bytes(r, T) for r in rows) if elementwise else None,
        }

    def roof(
        self, products: list[list[int]], dtypes: list[str]
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
                machine[name] = product_rate(1, m, k, n, dtype, self.device)
        machine[COPY] = copy_rate(2**24, self.device)
        own = {
            f"{dtype} {number} of {d}x{d} @ {d}x{columns}": product_rate(
                number, d, d, columns, dtype, self.device
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
