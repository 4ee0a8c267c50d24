"""The method as the paper states it: dense float64 matrices, plain loops, slow.

It shares no code with the package and knows nothing of structured storage. A
structure is a projection of a symmetric d x d matrix onto a dense d x d matrix; that
products stay inside the structure is a theorem which the comparison puts to the test.

Shapes: an axis has size `d`, its factor `K` and momentum `m` have shape `[d, d]`.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn


# --- structures: Pi(S) as a dense matrix ----------------------------------------------
def project_dense(S: Tensor) -> Tensor:
    """Keep every entry."""
    return S.clone()


def project_diagonal(S: Tensor) -> Tensor:
    """Keep the diagonal."""
    return S.diag().diag()


def project_blocks(S: Tensor, size: int) -> Tensor:
    """Keep blocks of one size along the diagonal; the last one may be smaller."""
    P = torch.zeros_like(S)
    for i in range(0, len(S), size):
        block = slice(i, i + size)
        P[block, block] = S[block, block]
    return P


def project_hierarchy(S: Tensor, a: int, e: int) -> Tensor:
    """Keep [[A, B1, B2], [0, diag(c), 0], [0, D, E]], with B and D doubled.

    A has `a` rows; E has `e`, or what A leaves.
    """
    d = len(S)
    first, last = min(a, d), max(min(a, d), d - e)
    top, middle, end = slice(0, first), slice(first, last), slice(last, d)
    P = torch.zeros_like(S)
    P[top, top] = S[top, top]
    P[top, middle] = 2 * S[top, middle]
    P[top, end] = 2 * S[top, end]
    P[middle, middle] = S[middle, middle].diag().diag()
    P[end, middle] = 2 * S[end, middle]
    P[end, end] = S[end, end]
    return P


def diagonals_of(S: Tensor) -> Tensor:
    """Return the matrix of k_|i-j|: k_0 = tr(S)/d, k_j = 2/(d-j) sum_i S_{i, i+j}."""
    i = torch.arange(len(S))
    j = (i[:, None] - i).abs()
    # S is symmetric: to sum it over the diagonals j and -j doubles all but the main
    k = torch.zeros(len(S), dtype=S.dtype).index_add_(0, j.flatten(), S.flatten())
    return (k / (len(S) - i))[j]


def project_triltoeplitz(S: Tensor) -> Tensor:
    """Average the diagonals; count those off the main one twice, put them below."""
    return diagonals_of(S).tril()


def project_triutoeplitz(S: Tensor) -> Tensor:
    """Average the diagonals; count those off the main one twice, put them above."""
    return diagonals_of(S).triu()


PROJECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": project_dense,
    "diagonal": project_diagonal,
    "block30diagonal": partial(project_blocks, size=30),
    "hierarchical15_15": partial(project_hierarchy, a=15, e=15),
    "triltoeplitz": project_triltoeplitz,
    "triutoeplitz": project_triutoeplitz,
    "block7diagonal": partial(project_blocks, size=7),
    "hierarchical3_2": partial(project_hierarchy, a=3, e=2),
}


# --- units: which parameters share a pre-conditioner, and as which tensor -------------
def squeeze(G: Tensor) -> Tensor:
    """Drop the axes of size 1, but keep at least one axis."""
    return G.reshape([d for d in G.shape if d != 1] or [1])


def tensor_itself(grads: Sequence[Tensor]) -> Tensor:
    """PerParameter."""
    return squeeze(grads[0])


def pixels_on_one_axis(grads: Sequence[Tensor]) -> Tensor:
    """FlattenKernel."""
    (G,) = grads
    return squeeze(G.reshape(*G.shape[:2], -1) if G.ndim > 3 else G)


def weight_with_bias_as_last_column(grads: Sequence[Tensor]) -> Tensor:
    """LinearWeightBias."""
    weight, bias = grads
    return squeeze(torch.cat([weight, bias.reshape(-1, 1)], dim=1))


def one_long_vector(grads: Sequence[Tensor]) -> Tensor:
    """FlattenEmbedding."""
    return torch.cat([G.reshape(-1) for G in grads])


def cut_back(U: Tensor, grads: Sequence[Tensor], group: Callable) -> list[Tensor]:
    """Undo a grouping: follow every entry by its number."""
    sizes = [G.numel() for G in grads]
    numbers = torch.arange(sum(sizes)).split(sizes)
    where = group([n.reshape(G.shape) for n, G in zip(numbers, grads, strict=True)])
    flat = torch.empty(sum(sizes), dtype=U.dtype)
    flat[where.reshape(-1)] = U.reshape(-1)
    return [
        part.reshape(G.shape) for part, G in zip(flat.split(sizes), grads, strict=True)
    ]


RULES = ("LinearWeightBias", "FlattenEmbedding", "PerParameter")


def find_units(
    model: nn.Module, rules: Sequence[str] = ("PerParameter",)
) -> list[tuple[list[nn.Parameter], Callable, bool]]:
    """Group the parameters of a model by rules named as in the package.

    Returns:
        For each unit its parameters, the function that makes one tensor of them, and
        whether they are weights of embeddings.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    units: list[tuple[list[nn.Parameter], Callable, bool]] = []
    taken: set[int] = set()
    for rule in rules:
        found: list[tuple[list[Any], Callable]] = []
        if rule == "PerParameter":
            found = [([p], tensor_itself) for p in model.parameters()]
        if rule == "FlattenKernel":
            found = [([p], pixels_on_one_axis) for p in model.parameters()]
        for layer in model.modules():
            if rule == "LinearWeightBias" and isinstance(layer, nn.Linear):
                pair = [layer.weight, layer.bias]
                found.append((pair, weight_with_bias_as_last_column))
            if rule == "FlattenEmbedding" and isinstance(layer, nn.Embedding):
                found.append(([layer.weight], one_long_vector))
        for params, group in found:
            if all(p is not None and id(p) not in taken for p in params):
                units.append((params, group, id(params[0]) in tables))
                taken |= {id(p) for p in params}
    return units


# --- the method -----------------------------------------------------------------------
def times(G: Tensor, M: Tensor, n: int) -> Tensor:
    """G x_n M: multiply the matrix M onto axis n of G."""
    return torch.tensordot(M, G, dims=([1], [n])).movedim(0, n)


def rows(shape: Sequence[int]) -> int:
    """Count the rows of a weight: axes of size 1 are none, but a kernel's outputs."""
    if len(shape) > 3 and shape[0] == 1:
        return 1
    long = [d for d in shape if d != 1]
    return long[0] if len(long) > 1 else 1


def unfold(A: Tensor, n: int) -> Tensor:
    """mat_n(A), shape `[d_n, product of the others]`."""
    return A.movedim(n, 0).reshape(A.shape[n], -1)


def per_axis(choice: Any, axes: int) -> tuple:
    """Resolve what the user wrote (one value, or a dict) for a tensor of N axes."""
    if isinstance(choice, dict):
        choice = choice[axes]
    return tuple(choice) if isinstance(choice, tuple | list) else axes * (choice,)


@dataclass
class Unit:
    """A set of parameters with their pre-conditioner and their own settings."""

    params: list[nn.Parameter]  # as handed over; never read again after construction
    group: Callable[[Sequence[Tensor]], Tensor]
    embeds: bool  # what is looked up is output, not a weight of inputs
    settings: dict[str, Any]
    start: list[Tensor] = field(default_factory=list)
    W: list[Tensor] = field(default_factory=list)
    V: list[Tensor] = field(default_factory=list)
    K: list[Tensor] = field(default_factory=list)
    m: list[Tensor] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)  # of what is pre-conditioned
    Pi: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Start at K = I, m = 0, V = 0 and a copy of the parameters."""
        self.start = [p.detach().double().clone() for p in self.params]
        self.W = [W.clone() for W in self.start]
        self.V = [torch.zeros_like(W) for W in self.W]
        dims = self.group(self.W).shape
        self.K = [torch.eye(d, dtype=torch.float64) for d in dims]
        if self.settings["initial_factors"] == "gradient":
            self.K = [torch.zeros_like(K) for K in self.K]
        self.m = [torch.zeros(d, d, dtype=torch.float64) for d in dims]
        names = per_axis(self.settings["structures"], len(dims))
        self.Pi = [PROJECTIONS[name] for name in names]


def norm_of(m: Tensor, clamp: str) -> float:
    """Return the norm that limits the step of a factor."""
    if clamp == "frobenius":
        return float((m**2).sum() ** 0.5)
    if torch.equal(m, m.diag().diag()):
        return float(m.abs().max())
    x = torch.zeros(len(m), dtype=torch.float64)
    x[m.diag().abs().argmax()] = 1.0
    x = m.T @ m @ x  # a round of the power method
    return float((m.T @ m @ x).norm() / (m @ x).norm())


def number_of_times(exponent: float, axis: int, axes: int) -> int:
    """Return how often a factor is multiplied on."""
    return {0.5: 1, 0.75: 2 if axis == 0 and axes > 1 else 1, 1.0: 2}[exponent]


class Twin:
    """Structured inverse-free and root-free Shampoo, one equation a line."""

    def __init__(
        self,
        units: Sequence[tuple[list[nn.Parameter], Callable, bool]],
        *,
        lr: float = 0.001,
        beta2: float = 0.01,
        alpha1: float = 0.9,
        alpha2: float = 0.5,
        lam: float = 0.001,
        kappa: float = 0.0,
        T: int | Callable[[int], bool] = 1,
        structures: Any = "dense",
        initial_factors: str = "identity",
        exponent: float = 1.0,
        momentum_first: bool = False,
        nesterov: bool = False,
        normalize_update: bool = False,
        follow_gradient: bool = False,
        max_relative_update: float | None = None,
        clamp: str = "frobenius",
        relative_damping: bool = False,
        cautious_decay: bool = False,
        decay_vectors: bool = True,
    ) -> None:
        """Take units as `find_units` returns them, and the documented settings."""
        settings = {k: v for k, v in locals().items() if k not in ("self", "units")}
        self.units = [Unit(*unit, deepcopy(settings)) for unit in units]
        self.global_step = 0

    def step(self, grads: dict[nn.Parameter, Tensor | None], batch_size: int) -> None:
        """Move what has a gradient, in every unit whose gradients are finite."""
        for unit in self.units:
            found = [grads.get(p) for p in unit.params]
            absent = [i for i, G in enumerate(found) if G is None]
            Gs = [
                torch.zeros_like(W) if G is None else G.double()
                for G, W in zip(found, unit.W, strict=True)
            ]
            if len(absent) < len(found) and all(G.isfinite().all() for G in Gs):
                kept = {i: (unit.W[i], unit.V[i]) for i in absent}
                for i in absent:
                    unit.V[i] = torch.zeros_like(unit.V[i])
                self._step(unit, Gs, batch_size)
                for i, rests in kept.items():
                    unit.W[i], unit.V[i] = rests
        self.global_step += 1

    def _step(self, unit: Unit, Gs: list[Tensor], B: int) -> None:
        s, K, m = unit.settings, unit.K, unit.m
        G = unit.group(Gs)
        axes, T = range(G.ndim), s["T"]

        starts = all(float(K_n.abs().max()) == 0 for K_n in K)
        due = T(self.global_step) if callable(T) else self.global_step % T == 0
        lam, relative = s["lam"], s["relative_damping"]
        if relative:
            lam = s["lam"] * B * float((G**2).mean())
        # whatever T says, factors start; a gradient of 0 has no scale
        if (due or starts) and not (relative and not G.any()):
            if starts:
                power = B * float((G**2).mean()) + lam
                for n in axes:
                    K[n] = power ** (-0.5 / G.ndim) * torch.eye(len(K[n])).double()
            # every quantity from the old factors of all axes
            A = B**0.5 * G
            for n in axes:
                A = times(A, K[n].T, n)
            step = []
            for n in axes:
                others = [i for i in axes if i != n]
                H = unfold(A, n) @ unfold(A, n).T / prod(G.shape[i] for i in others)
                traces = prod(float((K[i] ** 2).sum()) / G.shape[i] for i in others)
                damping = lam * traces * unit.Pi[n](K[n].T @ K[n])
                identity = torch.eye(G.shape[n], dtype=torch.float64)
                step.append((unit.Pi[n](H) + damping - identity) / 2)
            for n in axes:
                m[n] = s["alpha2"] * m[n] + (1 - s["alpha2"]) * step[n]
                size = max(1.0, norm_of(m[n], s["clamp"]))
                rate = s["beta2"] / size
                if number_of_times(s["exponent"], n, G.ndim) == 2:
                    K[n] = K[n] - rate * K[n] @ m[n]
                else:
                    E = torch.eye(len(K[n])).double() - rate / 2 * m[n]
                    K[n] = E @ K[n] @ E

        if s["momentum_first"]:
            unit.V = [s["alpha1"] * V + g for V, g in zip(unit.V, Gs, strict=True)]
        U = unit.group(unit.V) if s["momentum_first"] else G
        if s["momentum_first"] and s["nesterov"]:
            U = G + s["alpha1"] * U
        norm = float((U**2).sum() ** 0.5)
        unit.norms.append(norm)
        for n in axes:
            number = number_of_times(s["exponent"], n, G.ndim)
            size = float((K[n] ** 2).sum() / len(K[n])) ** 0.5
            P = K[n] if number == 1 else K[n] @ K[n].T  # 0 until factors start
            size = max(size, 1e-30)
            U = times(U, size ** (2 * s["exponent"] - number) * P, n)
        if s["normalize_update"]:
            X = U.reshape(len(U), -1) if U.ndim > 1 else U.reshape(1, -1)
            schatten4 = float((torch.linalg.svdvals(X) ** 4).sum() ** 0.25)
            shape = unit.params[0].shape if len(unit.params) == 1 else U.shape
            m = rows(shape) if U.ndim > 1 else 1
            size = (X.numel() if unit.embeds else m) ** 0.5
            wanted = size * min(X.shape) ** -0.25
            longest = 3 * size / max(1, min(X.shape)) ** 0.5
            spectral = float(torch.linalg.svdvals(X).max())
            scales = wanted / max(schatten4, 1e-300), longest / max(spectral, 1e-300)
            U = U * min(scales)
        if s["follow_gradient"]:
            mean = sum(unit.norms) / len(unit.norms)
            U = U * min(1.0, max(0.1, norm / max(mean, 1e-300)))
        for i, P in enumerate(cut_back(U, Gs, unit.group)):
            decayed = unit.W[i]
            if s["max_relative_update"] is not None:
                m = decayed.numel() if unit.embeds else rows(decayed.shape)
                least = 0.5 * m**0.5
                longest = max(float((decayed**2).sum() ** 0.5), least)
                longest *= s["max_relative_update"]
                length = s["lr"] * float((P**2).sum() ** 0.5)
                P = P * min(1.0, longest / max(length, 1e-300))
            if not s["decay_vectors"] and sum(d != 1 for d in decayed.shape) < 2:
                decayed = 0 * decayed
            if s["cautious_decay"]:
                decayed = decayed * (P * decayed > 0)
            P = P + s["kappa"] * decayed
            if s["momentum_first"]:
                unit.W[i] = unit.W[i] - s["lr"] * P
                continue
            unit.V[i] = s["alpha1"] * unit.V[i] + P
            move = P + s["alpha1"] * unit.V[i] if s["nesterov"] else unit.V[i]
            unit.W[i] = unit.W[i] - s["lr"] * move


# --- holding an optimizer against it --------------------------------------------------
def assert_agree(twin: Twin, optimizer: Any, tolerance: float) -> None:
    """Compare the parameters, factors and momenta of an optimizer with the twin's.

    Errors are measured in the largest entry and relative to how far the tensor has
    come from its start (the parameters' start, K = I, m = 0). On top, each step is
    granted one rounding in the tensor's dtype of what is added up in it: that is the
    tensor itself, and for a momentum the identity that it is a difference to. Factors
    of other dtypes on the same unit are learned from what passed through the coarsest
    of these: they are granted one rounding of that.

    Args:
        twin: The reference.
        optimizer: An instance of `SIRFShampoo` that took the same steps.
        tolerance: The largest error.
    """
    number = {
        id(p): i
        for i, group in enumerate(optimizer.param_groups)
        for p in group["params"]
    }
    assert len(optimizer.param_groups) == len(twin.units)
    for unit in twin.units:
        i = number[id(unit.params[0])]
        params = optimizer.param_groups[i]["params"]
        assert [id(p) for p in params] == [id(p) for p in unit.params]
        dtypes = set(optimizer.param_groups[i]["preconditioner_dtypes"])
        coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
        factors, momenta = (
            optimizer.preconditioner[i],
            optimizer.preconditioner_momenta[i],
        )
        # what, tensor, expected tensor, where it started, what it is added up from
        compared: list[tuple[str, Tensor, Tensor, Tensor, Tensor]] = []
        for j, (p, W, start) in enumerate(zip(params, unit.W, unit.start, strict=True)):
            compared.append((f"parameter {j}", p.detach(), W, start, W))
        for n, (K, expected) in enumerate(zip(factors, unit.K, strict=True)):
            start = torch.eye(len(expected))
            compared.append((f"K{n}", K.to_dense(), expected, start, expected))
        for n, (m, expected) in enumerate(zip(momenta, unit.m, strict=True)):
            if m is None:  # not kept where it is never read
                assert unit.settings["alpha2"] == 0
                continue
            start = torch.zeros_like(expected)
            terms = expected.abs() + torch.eye(len(expected))
            compared.append((f"m{n}", m.to_dense(), expected, start, terms))
        for name, tensor, expected, start, terms in compared:
            error = (tensor.double() - expected).abs().max().item()
            scale = (expected - start).abs().max().item()
            largest = terms.abs().max().item()
            rounding = torch.finfo(tensor.dtype).eps * largest * twin.global_step
            if not name.startswith("parameter") and len(dtypes) > 1:
                rounding = max(rounding, coarsest * largest)
            assert error <= tolerance * scale + rounding, (
                f"{name} of the unit of shapes {[tuple(p.shape) for p in params]} is "
                f"off by {error:.1e}, and has moved by {scale:.1e}"
            )
