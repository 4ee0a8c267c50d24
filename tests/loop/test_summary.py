"""A summary tells before the start what the optimizer then keeps and computes."""

import json
import math
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

import sirfshampoo
from sirfshampoo import (
    FlattenEmbedding,
    LinearWeightBias,
    PerParameter,
    SIRFShampoo,
    Summary,
    summary,
)
from sirfshampoo._report.table import tell_bytes
from sirfshampoo.structures import structure_class
from tests.cases import CONFIGS, FAST, MODELS, SHAPES, STRUCTURES, Tensors
from tests.conftest import LargestTensor

RULES = (LinearWeightBias(), FlattenEmbedding(), PerParameter())


def state_tensors(optimizer: SIRFShampoo, i: int) -> dict[str, list[Tensor]]:
    """Return what the state holds for a unit, by the key less the field."""
    found: dict[str, list[Tensor]] = {}
    for p in optimizer.param_groups[i]["params"]:
        for key, tensor in optimizer.state[p].items():
            found.setdefault(key.partition(".")[0], []).append(tensor)
    return found


def size(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def draw_gradients(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.randn_like(p)


# --- bytes ----------------------------------------------------------------------------
def assert_foretells(model: nn.Module, config: dict[str, Any]) -> None:
    """Hold every row against the state of an optimizer with the same arguments."""
    told = summary(model, **config)
    optimizer = SIRFShampoo(model, batch_size=4, **config)
    assert len(told.rows) == len(optimizer.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    for i, row in enumerate(told.rows):
        group = optimizer.param_groups[i]
        assert row.names == tuple(names[id(p)] for p in group["params"])
        assert row.rule == type(group["combine_params"][0]).__name__
        assert row.structures == group["structures"]
        dtypes = group["preconditioner_dtypes"]
        assert tuple(getattr(torch, name) for name in row.dtypes) == dtypes
        assert row.shape == tuple(K.dim for K in optimizer.preconditioner[i])
        assert row.parameters == sum(p.numel() for p in group["params"])
        held = state_tensors(optimizer, i)
        axes = range(len(row.shape))
        assert row.axis_bytes == tuple(
            size(held[f"K{n}"]) + size(held.get(f"m{n}", [])) for n in axes
        )
        assert row.momentum_bytes == size(held.get(optimizer._engine.momentum, []))
        assert row.state_bytes == sum(map(size, held.values()))
    everything = [t for entry in optimizer.state.values() for t in entry.values()]
    assert told.totals["state_bytes"] == size(everything) > 0


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bytes_are_those_of_the_state(name: str, dtype: torch.dtype) -> None:
    assert_foretells(Tensors(SHAPES, dtype), CONFIGS[name])


@pytest.mark.parametrize("model", MODELS)
def test_every_model_gets_the_bytes_of_its_state(model: str) -> None:
    net = MODELS[model].make()
    assert_foretells(net, {"structures": "diagonal", "combine_params": RULES})
    assert_foretells(net, {**FAST, "structures": "block7diagonal", "alpha2": 0.0})


def kept_beside_the_state(optimizer: SIRFShampoo) -> Iterator[Tensor]:
    """Yield what stacks keep of K Kᵀ that is no view of the state."""
    for stack in optimizer._stacks():
        own = {t.data_ptr() for K_n in stack.K for t in K_n.tensors()}
        for kept in stack.products._kept or []:
            fields = [t for t in kept.matrix.tensors() if t.data_ptr() not in own]
            yield from fields
            if kept.scale is not None:
                yield kept.scale


@pytest.mark.parametrize("T", [1, 3, lambda step: step % 2 == 0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("structures", STRUCTURES)
def test_kept_bytes_are_those_of_the_kept_products(
    T: Any, dtype: torch.dtype, structures: str
) -> None:
    model = Tensors(SHAPES, torch.float32)
    config = {"T": T, "structures": structures, "preconditioner_dtypes": dtype}
    told = summary(model, **config)
    optimizer = SIRFShampoo(model, batch_size=4, **config)
    for _ in range(2):
        draw_gradients(model)
        optimizer.step()
    kept = size(list(kept_beside_the_state(optimizer)))
    assert told.totals["kept_bytes"] == kept
    assert (kept > 0) == (
        T != 1
        and structures != "diagonal"  # its units are treated elementwise
        and (
            dtype == torch.float16
            or not structures.startswith(("hier", "tril", "triu"))
        )
    )


# --- operations -----------------------------------------------------------------------
def in_place(self: Any, A: Any, B: Any, out_shape: Any = None, **_: Any) -> int:
    """Count the product of the in-place form, which torch's counter leaves out."""
    return bmm_flop(A, B)


def counted(optimizer: SIRFShampoo, model: nn.Module) -> int:
    """Count the operations of the matrix products of a step."""
    draw_gradients(model)
    mapping = {torch.ops.aten.baddbmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        optimizer.step()
    return counter.get_total_flops()


# more rows than columns, and the reverse: K Kᵀ pays for one axis, the other, and both
@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (9, 9), (5, 6, 7), (31,)])
@pytest.mark.parametrize("lam", [0.0, 0.1])
@pytest.mark.parametrize("T", [1, 2, 20])
def test_dense_operations_are_those_that_torch_counts(
    shape: tuple[int, ...], lam: float, T: int
) -> None:
    model = Tensors([shape], torch.float32)
    optimizer = SIRFShampoo(model, batch_size=4, T=T, lam=lam)
    (row,) = summary(model, T=T, lam=lam).rows
    # X Xᵀ of a column that is added to Kᵀ K is no matrix product to torch
    unseen = 2 * shape[0] ** 2 if len(shape) == 1 and lam else 0
    assert counted(optimizer, model) + unseen == row.update_flops + row.step_flops
    if T > 1:
        assert counted(optimizer, model) == row.step_flops


@pytest.mark.parametrize("T", [1, 3])
def test_dense_operations_by_hand(T: int) -> None:
    a, b = 40, 12
    model = Tensors([(a, b)], torch.float32)
    (row,) = summary(model, T=T).rows
    through = 2 * a * a * b + 2 * b * b * a  # a product with the gradient a axis
    cubes = 2 * a**3 + 2 * b**3
    if T == 1:  # K Kᵀ of the short axis is made anew in each step
        assert row.update_flops == 2 * through + 2 * cubes
        assert row.step_flops == 2 * through - 2 * b * b * a + 2 * b**3
    else:  # 40 rows by 12 columns: worth it from four steps on, for 12 by 40 at once
        assert row.update_flops == 2 * through + 2 * cubes + 2 * b**3
        assert row.step_flops == 2 * through - 2 * b * b * a


@pytest.mark.parametrize("name", [s for s in STRUCTURES if "toeplitz" not in s])
@pytest.mark.parametrize("columns", [0, 1, 5])
def test_a_product_takes_two_operations_a_stored_number_and_column(
    name: str, columns: int
) -> None:
    cls = structure_class(name)
    assert cls.flops(61, columns) == 2 * cls.num_stored(61) * columns
    assert cls.flops(0, columns) == 0


@pytest.mark.parametrize("name", ["triltoeplitz", "triutoeplitz"])
def test_toeplitz_products_take_transforms_and_no_dense_product(name: str) -> None:
    cls = structure_class(name)
    d, columns = 4096, 100
    n = 2 * d  # the length of the transforms: 8192 holds 2 d − 1
    transform = 2.5 * n * math.log2(n)
    least = 2 * columns * transform
    assert least < cls.flops(d, columns) < 1.2 * least
    assert cls.flops(d, columns) < structure_class("dense").flops(d, columns) / 10
    assert cls.flops(d, 0) == 0


@pytest.mark.parametrize("structures", STRUCTURES)
def test_what_holds_no_numbers_costs_nothing(structures: str) -> None:
    (row,) = summary(Tensors([(0, 3)], torch.float32), structures=structures).rows
    assert row.parameters == row.momentum_bytes == 0
    assert row.state_bytes >= 16


# --- as the constructor reads its arguments -------------------------------------------
def test_groups_have_their_own_options() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    groups = [
        {"params": list(model[0].parameters()), "structures": "block7diagonal", "T": 4},
        {"params": list(model[1].parameters()), "alpha1": 0.0, "alpha2": 0.0},
    ]
    rows = summary(model, groups, batch_size=3, verbose_init=True).rows
    assert [row.names for row in rows] == [
        ("0.weight",),
        ("0.bias",),
        ("1.weight",),
        ("1.bias",),
    ]
    assert [row.structures[0] for row in rows] == ["block7diagonal"] * 2 + ["dense"] * 2
    assert [row.kept_bytes for row in rows] == [4 * (25 + 49), 0, 0, 0]
    assert [row.momentum_bytes for row in rows] == [4 * 35, 4 * 7, 0, 0]
    assert [row.axis_bytes for row in rows[2:]] == [(4 * 9, 4 * 49), (4 * 9,)]


def test_frozen_parameters_are_left_out_and_names_may_be_given() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    model[0].requires_grad_(False)
    assert [row.names for row in summary(model).rows] == [("1.weight",), ("1.bias",)]
    named = [("mine", model[1].weight)]
    assert [row.names for row in summary(model, named).rows] == [("mine",)]


def test_parameters_may_stand_in_the_place_of_the_model() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    expected = [row.names for row in summary(model).rows]
    assert [row.names for row in summary(model.named_parameters()).rows] == expected
    plain = summary(model.parameters(), structures="diagonal")
    assert [row.names for row in plain.rows] == [("0",), ("1",), ("2",), ("3",)]
    groups = [{"params": model[0].parameters(), "structures": "diagonal"}]
    assert [row.shape for row in summary(groups).rows] == [(7, 5), (7,)]
    with pytest.raises(ValueError, match="need no model"):
        summary(model.parameters(), combine_params=RULES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "Argument 'lr'"),
        ({"structures": "block0diagonal"}, "Argument 'structures'"),
        ({"combine_params": (LinearWeightBias(),)}, "Argument 'combine_params'"),
    ],
)
def test_wrong_arguments_are_refused_as_by_the_constructor(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        summary(nn.Linear(3, 2, bias=False), **options)
    with pytest.raises(TypeError, match="no_such_option"):
        summary(nn.Linear(3, 2), no_such_option=0.1)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Linear(3, 2)
    calls: list[int] = []

    def schedule(step: int) -> bool:
        calls.append(step)
        return True

    before = {key: len(value) for key, value in vars(model).items() if "hooks" in key}
    summary(model, T=schedule)
    after = {key: len(value) for key, value in vars(model).items() if "hooks" in key}
    assert before == after
    assert calls == []
    assert all(p.grad is None for p in model.parameters())


# --- before anything is allocated -----------------------------------------------------
class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)


class GPT2(nn.Module):
    """The parameters of GPT-2; 124 million by default."""

    def __init__(
        self, vocabulary: int = 50257, width: int = 768, layers: int = 12
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(1024, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight


@pytest.mark.parametrize("rules", [(PerParameter(),), RULES], ids=["each", "joint"])
def test_gpt2_on_the_meta_device_takes_under_a_second_and_no_memory(
    largest_tensor: LargestTensor, rules: Any
) -> None:
    with torch.device("meta"):
        model = GPT2()
    structures = {1: "diagonal", 2: "dense"}
    with largest_tensor:
        start = perf_counter()
        told = summary(model, structures=structures, combine_params=rules)
        text = str(told)
        elapsed = perf_counter() - start
    assert elapsed < 1.0
    assert largest_tensor.numbers == 0
    assert told.totals["parameters"] == 124_439_808
    assert {row.device for row in told.rows} == {"meta"}
    # 148 pre-conditioners in a table that fits a screen
    assert len(told.rows) == (148 if len(rules) == 1 else 100)
    assert len(text.splitlines()) < 20
    if len(rules) == 1:  # the dense factor of the vocabulary, and its momentum
        assert told.rows[0].axis_bytes[0] == 2 * 4 * 50257**2


def test_real_parameters_are_not_copied_either(largest_tensor: LargestTensor) -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 30), nn.Linear(30, 50))
    with largest_tensor:
        told = summary(model, combine_params=RULES)
    assert largest_tensor.numbers == 0
    assert [row.shape for row in told.rows] == [(30, 9), (50, 31), (400,)]


def test_many_parameters_take_no_quadratic_time() -> None:
    model = Tensors([(3, 2)] * 3000, torch.float32)
    start = perf_counter()
    told = summary(model)
    assert perf_counter() - start < 3.0
    assert len(told.rows) == 3000
    assert len(str(told).splitlines()) < 10


class Scattered(PerParameter):
    """A rule of a user's that looks at numbers, which meta tensors do not have."""

    def group(self, tensors: list[Tensor]) -> Tensor:
        (tensor,) = tensors
        assert float(tensor.flatten()[0]) is not None
        return super().group(tensors)


def test_a_rule_that_needs_numbers_gets_them() -> None:
    (row, _) = summary(nn.Linear(3, 2), combine_params=(Scattered(),)).rows
    assert row.rule == "Scattered"
    assert row.shape == (2, 3)


# --- as text, as data -----------------------------------------------------------------
def small() -> Summary:
    layers = [nn.Linear(4, 4) for _ in range(3)]
    model = nn.Sequential(nn.Embedding(2000, 4), *layers)
    structures = {1: "diagonal", 2: ("dense", "diagonal")}
    dtypes = {1: None, 2: (torch.bfloat16, None)}
    return summary(model, structures=structures, preconditioner_dtypes=dtypes)


def test_the_table_folds_what_is_alike() -> None:
    told = small()
    lines = str(told).splitlines()
    assert lines[0] == (
        "SIRFShampoo: 7 pre-conditioners for 8,060 numbers, "
        + tell_bytes(told.totals["state_bytes"])
        + " of state"
    )
    head, _, embedding, weights, biases, _, total = (
        [cell for cell in line.split("  ") if cell] for line in lines[2:9]
    )
    assert [cell.strip() for cell in head][:6] == [
        "parameters",
        "units",
        "shape",
        "structures",
        "types",
        "numbers",
    ]
    assert [cell.strip() for cell in weights][:6] == [
        "1.weight, and 2 more",
        "3",
        "4 x 4",
        "dense, diagonal",
        "bfloat16, float32",
        "48",
    ]
    assert [cell.strip() for cell in embedding][6:] == [
        "15.3 MiB",
        "31.2 KiB",
        "0 B",
        "32.1 G",
        "64.0 M",
    ]
    assert biases[0].strip() == "1.bias, and 2 more"
    assert [cell.strip() for cell in total][:3] == ["total", "7", "8,060"]
    assert len({len(line) for line in lines[3:9]}) == 1


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (5 * 2**30, "5.0 GiB"),
        (3000 * 2**40, "3,000.0 TiB"),
    ],
)
def test_bytes_for_people(number: int, text: str) -> None:
    assert tell_bytes(number) == text


def test_plain_data_goes_through_json() -> None:
    told = small()
    data = told.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert data["totals"] == told.totals
    assert len(data["rows"]) == 7
    assert data["rows"][1] == {
        "names": ["1.weight"],
        "rule": "PerParameter",
        "shape": [4, 4],
        "structures": ["dense", "diagonal"],
        "dtypes": ["bfloat16", "float32"],
        "device": "cpu",
        "parameters": 16,
        "axis_bytes": [2 * 2 * 16, 2 * 4 * 4],
        "momentum_bytes": 64,
        "counter_bytes": 16,
        "kept_bytes": 0,
        "update_flops": told.rows[1].update_flops,
        "step_flops": told.rows[1].step_flops,
        "factor_bytes": 96,
        "state_bytes": 96 + 64 + 16,
    }


def test_rich_shows_the_same_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    console = pytest.importorskip("rich.console").Console(width=200, color_system=None)
    told = small()
    with console.capture() as capture:
        console.print(told)
    shown = capture.get()
    for line in str(told).splitlines()[4:7]:
        for cell in line.split("  "):
            assert cell.strip() in shown
    assert "7 pre-conditioners" in shown


def test_a_summary_cannot_be_changed() -> None:
    told = small()
    with pytest.raises(AttributeError):
        told.rows = ()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        told.rows[0].parameters = 0  # type: ignore[misc]


def test_the_example_of_the_documentation() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(50257, 768)
    told = sirfshampoo.summary(model, structures="diagonal").totals["state_bytes"]
    assert f"        {told}\n" in (summary.__doc__ or "")
