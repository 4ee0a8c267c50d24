"""Updates of the factors spread over the steps: each once a period, none a spike."""

import warnings
from contextlib import AbstractContextManager
from copy import deepcopy
from functools import partial
from itertools import product
from math import lcm
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from sirfshampoo import LinearWeightBias, PerParameter, SIRFShampoo, summary
from sirfshampoo._engine.spread import costliest_step, spread
from tests.cases import FAST, SHAPES, STRUCTURES, Tensors, mixture
from tests.twin import Twin, assert_agree, find_units

BATCH = 4


# --- the assignment -------------------------------------------------------------------
def loads(costs: list[int], periods: list[int], phases: list[int]) -> list[int]:
    """Return what each step until all begins anew has to do."""
    pieces = list(zip(costs, periods, phases, strict=True))
    return [
        sum(cost for cost, period, phase in pieces if step % period == phase)
        for step in range(lcm(*periods))
    ]


def best(costs: list[int], period: int) -> int:
    """Return the least possible load of the costliest step, by trying all phases."""
    every = product(range(period), repeat=len(costs))
    return min(
        max(loads(costs, [period] * len(costs), list(phases))) for phases in every
    )


positive = st.integers(0, 10**12)


@given(st.lists(positive, min_size=1, max_size=6), st.integers(1, 4))
def test_the_costliest_step_is_within_the_bound_of_the_best(
    costs: list[int], period: int
) -> None:
    periods = [period] * len(costs)
    largest = max(loads(costs, periods, spread(costs, periods)))
    # 4/3 - 1/(3T), in integers
    assert 3 * period * largest <= (4 * period - 1) * best(costs, period)


pieces = st.lists(st.tuples(positive, st.integers(1, 12)), min_size=1, max_size=40)


@given(pieces)
def test_phases_lie_within_their_periods_and_what_is_told_is_the_most(
    pieces: list[tuple[int, int]],
) -> None:
    costs, periods = [list(column) for column in zip(*pieces, strict=True)]
    phases = spread(costs, periods)
    assert all(0 <= p < T for p, T in zip(phases, periods, strict=True))
    assert phases == spread(costs, periods)
    largest = max(loads(costs, periods, phases))
    told = costliest_step(costs, periods, phases)
    assert largest <= told <= sum(costs)
    if len(set(periods) - {1}) <= 2:
        assert largest == told
    assert costliest_step(costs, periods, [0] * len(costs)) == sum(costs)


def test_equal_costs_are_dealt_out_in_order() -> None:
    assert spread([5] * 7, [3] * 7) == [0, 1, 2, 0, 1, 2, 0]


def test_longest_first_by_hand() -> None:
    # 9 | 8 | 7, then 6 to the 7, 5 to the 8, 4 to the 9
    assert spread([4, 5, 6, 7, 8, 9], [3] * 6) == [0, 1, 2, 2, 1, 0]


def test_periods_know_of_each_other() -> None:
    # the two costly ones meet in no step, since 2 and 4 share a factor
    phases = spread([10, 10], [2, 4])
    assert max(loads([10, 10], [2, 4], phases)) == 10
    assert costliest_step([10, 10], [2, 4], phases) == 10


def test_nothing_and_every_step() -> None:
    assert spread([], []) == []
    assert costliest_step([], [], []) == 0
    assert spread([3, 4], [1, 1]) == [0, 0]
    assert costliest_step([3, 4], [1, 1], [0, 0]) == 7


def test_a_thousand_steps_and_many_pieces_take_no_time() -> None:
    costs = list(range(3000))
    phases = spread(costs, [1000 - i % 2 for i in range(3000)])
    assert len(set(phases)) == 1000


# --- the optimizer --------------------------------------------------------------------
def factors(optimizer: SIRFShampoo) -> list[list[torch.Tensor]]:
    return [
        [t.clone() for K_n in K for _, t in K_n.named_tensors()]
        for K in optimizer.preconditioner
    ]


def draw_gradients(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return {p: p.grad.clone() for p in model.parameters()}


def observed_step(optimizer: SIRFShampoo, model: nn.Module) -> list[bool]:
    """Take a step; return, a group, whether its factors changed."""
    before = factors(optimizer)
    draw_gradients(model)
    optimizer.step()
    return [
        not all(map(torch.equal, old, new))
        for old, new in zip(before, factors(optimizer), strict=True)
    ]


def many_layers(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Units of all shapes, and stacks of several rows."""
    layers = (nn.Linear(7, 5) for _ in range(7))
    return nn.Sequential(Tensors(SHAPES, dtype), *layers).to(dtype)


@pytest.mark.parametrize("structures", ["dense", "diagonal", mixture(2)], ids=str)
@pytest.mark.parametrize("T", [1, 2, 5])
def test_every_unit_is_updated_once_a_period_always_at_the_same_place(
    structures: Any, T: int
) -> None:
    model = many_layers()
    config = {**FAST, "structures": structures, "T": T, "spread_updates": True}
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    periods = [[observed_step(optimizer, model) for _ in range(T)] for _ in range(3)]
    assert periods[0] == periods[1] == periods[2]
    assert all(sum(of_unit) == 1 for of_unit in zip(*periods[0], strict=True))
    # what each step does is what the summary says
    told = summary(model, **config)
    work = [
        sum(
            row.update_flops
            for row, is_due in zip(told.rows, due, strict=True)
            if is_due
        )
        for due in periods[0]
    ]
    assert max(work) + told.totals["step_flops"] == told.spread_peak_flops
    assert told.peak_flops == told.totals["update_flops"] + told.totals["step_flops"]
    if T > 1:
        assert told.spread_peak_flops < told.peak_flops


def phase_of(T: int, phase: int, step: int) -> bool:
    return step % T == phase


@pytest.mark.parametrize(
    "structures", [*STRUCTURES, mixture(3)], ids=[*STRUCTURES, "mixture"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_follows_a_twin_that_updates_in_the_same_steps(
    structures: Any, dtype: torch.dtype, place: AbstractContextManager[Any]
) -> None:
    T, model = 3, many_layers(dtype)
    config = {**FAST, "kappa": 0.1, "structures": structures}
    rules = (LinearWeightBias(), PerParameter())
    optimizer = SIRFShampoo(
        model,
        batch_size=BATCH,
        combine_params=rules,
        **config,
        T=T,
        spread_updates=True,
    )
    trial = deepcopy((model, optimizer))
    seen = [observed_step(trial[1], trial[0]) for _ in range(T)]
    twin = Twin(find_units(model, tuple(type(r).__name__ for r in rules)), **config)
    first = [id(group["params"][0]) for group in optimizer.param_groups]
    for unit in twin.units:
        i = first.index(id(unit.params[0]))
        phase = [due[i] for due in seen].index(True)
        unit.settings["T"] = partial(phase_of, T, phase)
    assert len({unit.settings["T"].args[1] for unit in twin.units}) == T
    for _ in range(12):
        gradients = draw_gradients(model)
        with place:
            optimizer.step()
        twin.step(gradients, BATCH)
    assert_agree(twin, optimizer, 1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("T", [1, 3])
def test_off_and_one_unit_alone_update_in_step_0(T: int) -> None:
    path = []
    for spread_updates in (False, True):
        torch.manual_seed(0)
        model = Tensors([(5, 7)], torch.float32)
        optimizer = SIRFShampoo(
            model, batch_size=BATCH, T=T, spread_updates=spread_updates, **FAST
        )
        for _ in range(7):
            draw_gradients(model)
            optimizer.step()
        path.append(next(model.parameters()).detach().clone())
    assert torch.equal(*path)


def test_phases_follow_the_groups_as_they_are_now() -> None:
    both = nn.Sequential(many_layers(), nn.Linear(7, 5).double())
    model, late = both
    config = {**FAST, "T": 4, "spread_updates": True}
    optimizer = SIRFShampoo(both, model.parameters(), batch_size=BATCH, **config)
    for _ in range(4):
        observed_step(optimizer, model)
    optimizer.add_param_group({"params": list(late.parameters())})
    seen = [observed_step(optimizer, both) for _ in range(4)]
    assert all(sum(of_unit) == 1 for of_unit in zip(*seen, strict=True))
    for group in optimizer.param_groups:
        group["T"] = 2
    for _ in range(2):
        seen = [observed_step(optimizer, both) for _ in range(2)]
        assert all(sum(of_unit) == 1 for of_unit in zip(*seen, strict=True))
    fresh = SIRFShampoo(both, batch_size=BATCH, **{**config, "T": 2})
    assert [observed_step(fresh, both) for _ in range(2)] == seen


def test_a_resumed_run_updates_where_the_other_would_have() -> None:
    config = {**FAST, "T": 4, "spread_updates": True, "structures": mixture(1)}
    model = many_layers()
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    for _ in range(3):
        observed_step(optimizer, model)
    twin = deepcopy(model)
    resumed = SIRFShampoo(twin, batch_size=BATCH, **{**config, "T": 2})
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))  # brings T along
    for step in range(6):
        torch.manual_seed(step)
        due = observed_step(optimizer, model)
        torch.manual_seed(step)
        assert observed_step(resumed, twin) == due
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


def in_place(S: Any, A: Any, B: Any, *_: Any, **__: Any) -> int:
    """Count what baddbmm_ takes, which torch does not."""
    return bmm_flop(A, B)


def counted(optimizer: SIRFShampoo) -> int:
    """Count the operations of the matrix products of a step."""
    mapping = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        optimizer.step()
    return counter.get_total_flops()


@pytest.mark.parametrize("T", [2, 4])
def test_products_are_made_anew_for_the_rows_that_changed_only(T: int) -> None:
    model = Tensors([(40, 12)] * 4, torch.float32)  # T = 2: K Kᵀ pays for one axis
    optimizer = SIRFShampoo(model, batch_size=BATCH, T=T, spread_updates=True)
    told = summary(model, T=T).totals
    for step in range(3 * T):
        draw_gradients(model)
        flops = counted(optimizer)
        if step >= T:  # before, K Kᵀ of all rows was made once
            assert flops == told["update_flops"] // T + told["step_flops"]


def test_a_callable_keeps_its_own_mind_and_it_is_said() -> None:
    model = nn.Linear(3, 2)
    with pytest.warns(UserWarning, match=r"no effect.*callable 'T'.*'weight', 'bias'"):
        optimizer = SIRFShampoo(
            model,
            batch_size=BATCH,
            T=partial(phase_of, 3, 1),
            spread_updates=True,
        )
    seen = [observed_step(optimizer, model) for _ in range(6)]
    assert seen == [[False] * 2, [True] * 2, [False] * 2] * 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SIRFShampoo(model, batch_size=BATCH, T=3, spread_updates=True)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_what_is_no_flag_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="'spread_updates' must be True or False"):
        SIRFShampoo(nn.Linear(3, 2), spread_updates=value)


def test_the_summary_tells_both_peaks() -> None:
    told = summary(Tensors([(20, 10)] * 6, torch.float32), T=3)
    update, step = told.rows[0].update_flops, told.rows[0].step_flops
    assert told.peak_flops == 6 * (update + step)
    assert told.spread_peak_flops == 2 * update + 6 * step
    assert told.to_dict()["spread_peak_flops"] == told.spread_peak_flops
    assert told.to_dict()["peak_flops"] == told.peak_flops
    assert "with spread_updates: " in str(told)
    with pytest.warns(UserWarning, match="no effect"):
        mixed = summary(
            Tensors([(20, 10)] * 6, torch.float32),
            T=partial(phase_of, 3, 0),
            spread_updates=True,
        )
    assert mixed.peak_flops == mixed.spread_peak_flops


class FailsOnce(PerParameter):
    """Joins no gradients at the first time."""

    fails = False

    def group(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Fail, or return the tensor."""
        if self.fails:
            self.fails = False
            raise RuntimeError("no memory")
        return super().group(tensors)


@pytest.mark.parametrize("start", [0, 1])  # an update is due, or not
def test_a_step_that_fails_leaves_no_products_half_made(start: int) -> None:
    T, rule, model = 3, FailsOnce(), Tensors([(5, 7)] * 3, torch.float64)
    config = {**FAST, "T": T}
    optimizer = SIRFShampoo(model, batch_size=BATCH, combine_params=(rule,), **config)
    twin = Twin(find_units(model), **config)
    optimizer.global_step = twin.global_step = start
    for step in range(6):
        gradients = draw_gradients(model)
        if step in (0, 4):
            rule.fails = True
            with pytest.raises(RuntimeError, match="no memory"):
                optimizer.step()
        optimizer.step()
        twin.step(gradients, BATCH)
    assert_agree(twin, optimizer, 1e-12)
