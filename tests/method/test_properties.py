"""What holds for all shapes, structures, types, options and gradients that lack."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from sirfshampoo import SIRFShampoo
from tests.cases import STRUCTURES, Tensors, at_powers_of_two

# What is drawn has steps without any gradient.
pytestmark = pytest.mark.filterwarnings("ignore:No parameter of the optimizer has")

Shape = tuple[int, ...]


def alternately(step: int) -> bool:
    """Update the pre-conditioner in steps 1, 3, 5, ..."""
    return step % 2 == 1


# --- what is drawn --------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """Parameters, an optimizer's arguments, and the gradients of a few steps."""

    shapes: list[Shape]
    dtype: torch.dtype
    config: dict[str, Any]
    present: list[list[bool]]  # whether a parameter has a gradient: [step][parameter]
    seed: int

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters, the same in each call."""
        torch.manual_seed(self.seed)
        return list(Tensors(self.shapes, self.dtype).parameters())

    def optimizer(self, params: Iterable[nn.Parameter]) -> SIRFShampoo:
        """Set up the optimizer for parameters."""
        return SIRFShampoo(params, batch_size=5, **self.config)

    def give_gradients(self, params: Sequence[nn.Parameter], step: int) -> None:
        """Set the gradients of a step, the same in each call."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        for p, present in zip(params, self.present[step], strict=True):
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = noise.to(p.dtype) if present else None

    @property
    def steps(self) -> range:
        """The numbers of the steps."""
        return range(len(self.present))


SIZES = st.sampled_from([0, 1, 1, 2, 3, 5, 7, 15, 16, 17, 31, 33])
FACTORS = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTERVALS = (1, 1, 2, 3, alternately, at_powers_of_two)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """Draw 0 to 4 axes; at most two are long, so that no tensor is large."""
    shape = draw(st.lists(SIZES, max_size=4))
    long = [n for n, d in enumerate(shape) if d > 7]
    return tuple(d if n not in long[2:] else 2 for n, d in enumerate(shape))


def by_axes(choices: Sequence[Any]) -> st.SearchStrategy[dict[int, tuple[Any, ...]]]:
    """Draw a choice for each axis of tensors with 1 to 4 axes."""
    choice = st.sampled_from(choices)
    return st.fixed_dictionaries({n: st.tuples(*n * [choice]) for n in range(1, 5)})


def with_distinct_lengths(found: Sequence[Shape]) -> list[Shape]:
    """Return the shapes of which no axis is as long as one of those before."""
    kept: list[Shape] = []
    lengths: set[int] = set()
    for shape in found:
        if lengths.isdisjoint(shape):
            kept.append(shape)
            lengths.update(shape)
    return kept


@st.composite
def cases(
    draw: st.DrawFn,
    distinct: bool = False,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.float64, torch.bfloat16),
    factors: Sequence[torch.dtype | None] = FACTORS,
) -> Case:
    """Draw a case; unless shapes must be distinct, some come several times.

    Distinct shapes have no lengths in common: no factors learn together.
    """
    found = draw(st.lists(shapes(), min_size=1, max_size=4, unique=True))
    if distinct:
        found = with_distinct_lengths(found)
    else:
        found = [s for s in found for _ in range(draw(st.sampled_from([1, 2, 3])))]
    found = draw(st.permutations(found))
    options: dict[str, Sequence[float]] = {
        "lr": [0.05],
        "beta2": [0.2, 0.05],
        "alpha1": [0.9, 0.0],
        "alpha2": [0.5, 0.0],
        "kappa": [0.0, 0.1],
        "lam": [0.01, 0.0, 1.0],
    }
    config = {key: draw(st.sampled_from(values)) for key, values in options.items()}
    config["T"] = draw(st.sampled_from(INTERVALS))
    config["structures"] = draw(by_axes(STRUCTURES))
    config["preconditioner_dtypes"] = draw(by_axes(factors))
    steps = draw(st.integers(2, 5))
    mostly = st.sampled_from([True, True, True, False])
    present = st.lists(mostly, min_size=len(found), max_size=len(found))
    return Case(
        shapes=found,
        dtype=draw(st.sampled_from(dtypes)),
        config=config,
        present=draw(st.lists(present, min_size=steps, max_size=steps)),
        seed=draw(st.integers(0, 999)),
    )


# --- what is compared -----------------------------------------------------------------
def numbers(optimizer: SIRFShampoo, p: nn.Parameter) -> dict[str, Tensor]:
    """Return a parameter and its state."""
    return {"parameter": p.detach(), **optimizer.state[p]}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare to the bit and the type."""
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert ours[key].dtype == theirs[key].dtype
        assert torch.equal(ours[key], theirs[key]), key


# Of the numbers, in units of the largest one. Products of stacks and of single matrices
# add in another order; half precision keeps the difference of a rounding, and the next
# update builds on it.
ROUNDING = {
    torch.float64: 1e-11,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Compare up to rounding, that of the coarsest type."""
    assert ours.keys() == theirs.keys()
    real = [key for key in ours if ours[key].is_floating_point()]
    tolerance = max(ROUNDING[ours[key].dtype] for key in real)
    for key in ours:
        a, b = ours[key].double(), theirs[key].double()
        if key not in real:
            assert torch.equal(a, b), key
        elif a.numel():
            largest = max(b.abs().max().item(), 1.0)
            assert (a - b).abs().max() <= tolerance * largest, key


def train(case: Case, order: Callable[[list[Any]], list[Any]]) -> list[dict[str, Any]]:
    """Train with the parameters in some order; return each one's end, unordered."""
    params = case.parameters()
    optimizer = case.optimizer(order(params))
    for step in case.steps:
        case.give_gradients(params, step)
        optimizer.step()
    return [numbers(optimizer, p) for p in params]


def train_alone(case: Case) -> list[dict[str, Any]]:
    """Train each parameter by an optimizer of its own; return the ends."""
    params = case.parameters()
    optimizers = [case.optimizer([p]) for p in params]
    for step in case.steps:
        case.give_gradients(params, step)
        for optimizer in optimizers:
            optimizer.step()
    return [numbers(o, p) for o, p in zip(optimizers, params, strict=True)]


# --- the properties -------------------------------------------------------------------
def through_a_file(optimizer: SIRFShampoo, case: Case) -> SIRFShampoo:
    """Return an optimizer of new parameters that has read the other's checkpoint."""
    values = [group["params"][0].detach() for group in optimizer.param_groups]
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), values], file)
    file.seek(0)
    state_dict, values = torch.load(file, weights_only=True)
    resumed = case.optimizer([nn.Parameter(value) for value in values])
    resumed.load_state_dict(state_dict)
    return resumed


@given(cases(), st.data())
def test_resumed_equals_uninterrupted(case: Case, data: st.DataObject) -> None:
    save_before = data.draw(st.integers(0, len(case.steps)))
    whole = resumed = case.optimizer(case.parameters())
    for step in case.steps:
        if step == save_before:
            resumed = through_a_file(whole, case)
        for optimizer in {whole, resumed}:
            params = [group["params"][0] for group in optimizer.param_groups]
            case.give_gradients(params, step)
            optimizer.step()
    if save_before == len(case.steps):
        resumed = through_a_file(whole, case)
    assert resumed.global_step == len(case.steps)
    for ours, theirs in zip(resumed.param_groups, whole.param_groups, strict=True):
        (p,), (q,) = ours["params"], theirs["params"]
        assert p is not q
        assert_same(numbers(resumed, p), numbers(whole, q))


@given(cases())
def test_together_equals_one_by_one(case: Case) -> None:
    together = train(case, order=list)
    for ours, theirs in zip(together, train_alone(case), strict=True):
        assert_close(ours, theirs)


@given(cases(distinct=True))
def test_together_equals_one_by_one_to_the_bit_where_nothing_is_shared(
    case: Case,
) -> None:
    together = train(case, order=list)
    for ours, theirs in zip(together, train_alone(case), strict=True):
        assert_same(ours, theirs)


@given(cases(), st.randoms(use_true_random=False))
def test_the_order_of_parameters_does_not_matter(case: Case, random: Any) -> None:
    shuffled = train(case, order=lambda ps: random.sample(ps, len(ps)))
    alone = with_distinct_lengths(case.shapes) == case.shapes
    for ours, theirs in zip(shuffled, train(case, order=list), strict=True):
        if alone:
            assert_same(ours, theirs)
        else:
            assert_close(ours, theirs)


@given(cases(dtypes=[torch.float32, torch.float64]))
def test_without_gradient_a_unit_stays_and_with_one_it_moves(case: Case) -> None:
    assume(not all(map(all, case.present)))
    params = case.parameters()
    optimizer = case.optimizer(params)
    for step in case.steps:
        case.give_gradients(params, step)
        before = [
            {key: t.clone() for key, t in numbers(optimizer, p).items()} for p in params
        ]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            assert int(old.pop("step")) == step
            new = numbers(optimizer, p)
            assert int(new["step"]) == step + 1
            if p.grad is None:
                assert_same({key: new[key] for key in old}, old)
            elif p.numel():
                assert not torch.equal(new["parameter"], old["parameter"])


@given(cases(), st.sampled_from([1e-3, 1.0, 10.0]))
def test_all_stays_finite(case: Case, scale: float) -> None:
    params = case.parameters()
    optimizer = case.optimizer(params)
    for step in case.steps:
        case.give_gradients(params, step)
        for p in params:
            if p.grad is not None:
                p.grad.mul_(scale)
        optimizer.step()
    for p in params:
        assert all(t.isfinite().all() for t in numbers(optimizer, p).values())
        assert int(optimizer.state[p]["skipped"]) == 0
