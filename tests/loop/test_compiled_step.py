"""A compiled step: two variants, whatever a scheduler does, and the same numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.fx import GraphModule
from torch.optim.lr_scheduler import ExponentialLR

from sirfshampoo import SIRFShampoo
from sirfshampoo._method import descent
from tests.cases import FAST, STRUCTURES, mixture
from tests.twin import Twin, assert_agree, find_units

STEPS, T, BATCH = 20, 3, 4

pytestmark = [
    # of functions without side effects
    pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cac"),
    pytest.mark.filterwarnings("ignore:Profiler record function"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Start and end with nothing compiled."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    counters.clear()


def layers(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers that share stacks, and one of another shape."""
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 7), nn.Linear(7, 5)).to(dtype)


def draw_gradients(model: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return {p: p.grad.clone() for p in model.parameters()}


def graph_breaks() -> int:
    return sum(counters["graph_break"].values())


@pytest.mark.parametrize(
    "structures",
    [
        pytest.param("dense", id="dense"),
        pytest.param(mixture(3), id="mixture"),
        *(pytest.param(name, marks=pytest.mark.heavy) for name in STRUCTURES[1:]),
    ],
)
def test_two_variants_follow_the_twin_under_a_scheduler(structures: Any) -> None:
    model = layers()
    config = {**FAST, "T": T, "structures": structures, "kappa": 0.1}
    config["follow_gradient"] = True
    lr = torch.tensor(FAST["lr"], dtype=torch.float64)
    optimizer = SIRFShampoo(model, batch_size=BATCH, **{**config, "lr": lr})
    scheduler = ExponentialLR(optimizer, 0.9)
    twin = Twin(find_units(model), **config)
    backend = CompileCounter()
    step = torch.compile(optimizer.step, backend=backend)
    graphs, breaks = [], []
    for i in range(STEPS):
        gradients = draw_gradients(model, i)
        step()
        twin.step(gradients, BATCH)
        scheduler.step()
        for unit in twin.units:
            unit.settings["lr"] *= 0.9
        graphs.append(backend.frame_count)
        breaks.append(graph_breaks())
    # one graph with an update in step 0, one without in step 1; each is all of the step
    assert graphs == [1] + (STEPS - 1) * [2]
    assert breaks[1:] == (STEPS - 1) * [breaks[1]]
    assert optimizer.global_step == STEPS
    assert_agree(twin, optimizer, 1e-12)


def test_spread_updates_compile_one_variant_a_step_of_the_period() -> None:
    model = layers()
    optimizer = SIRFShampoo(
        model, batch_size=BATCH, T=T, spread_updates=True, lr=torch.tensor(0.05)
    )
    backend = CompileCounter()
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(4 * T):
        draw_gradients(model, i)
        step()
        if i + 1 == 2 * T:  # in the first period, products are made for all rows
            compiled = backend.frame_count
    assert backend.frame_count == compiled


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_numbers_are_those_of_the_plain_step(backend: str) -> None:
    paths = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = layers(torch.float32)
        optimizer = SIRFShampoo(model, batch_size=BATCH, **FAST, T=T)
        step = torch.compile(optimizer.step, backend=backend)
        for i in range(5):
            draw_gradients(model, i)
            if compiles:
                step()
            else:
                optimizer.step()
        paths.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*paths, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kappa", [0.0, 0.1])
def test_no_list_of_tensors_where_a_compiler_fails_on_lists(
    kappa: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs with torch 2.10 and 2.11: lists and reductions, in one graph."""
    monkeypatch.setattr(descent, "_LISTS_COMPILE", False)
    names: list[str] = []

    def backend(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model = layers()
    config = {**FAST, "T": T, "kappa": kappa, "follow_gradient": True}
    optimizer = SIRFShampoo(model, batch_size=BATCH, **config)
    twin = Twin(find_units(model), **config)
    step = torch.compile(optimizer.step, backend=backend)
    for i in range(2 * T):
        gradients = draw_gradients(model, i)
        step()
        twin.step(gradients, BATCH)
    assert "add_" in names
    assert not [name for name in names if "_foreach" in name]
    assert_agree(twin, optimizer, 1e-12)


def test_the_arithmetic_is_one_graph_without_a_break() -> None:
    model = layers()
    optimizer = SIRFShampoo(model, batch_size=BATCH, T=T, structures=mixture(1))
    draw_gradients(model, 0)
    torch.compile(optimizer.step, backend="eager")()
    # what is left to Python: the plan before, the count after
    told = " ".join(counters["graph_break"])
    assert "_plan" in told
    assert "_close" in told
    assert "item()" not in told
    assert "data-dependent" not in told.lower()
