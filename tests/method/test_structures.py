"""Every structure agrees with its dense definition, at a cost of what it stores."""

import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import FrozenInstanceError
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sirfshampoo.structures import SUPPORTED_STRUCTURES, structure_class
from sirfshampoo.structures.base import StructuredMatrix
from sirfshampoo.structures.block_diagonal import block_diagonal
from sirfshampoo.structures.hierarchical import hierarchical
from tests.cases import DOCUMENTED_STRUCTURES, STRUCTURES
from tests.conftest import LargestTensor
from tests.twin import PROJECTIONS

DIMS = (0, 1, 7, 15, 16, 29, 30, 31, 60, 61, 97)
BATCHES = ((), (3,))
COLUMNS = (0, 1, 5)
SCALES = (1.0, 0.3, 0.0)
# relative, against float64 from the same (rounded) inputs
TOLERANCES = {
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}
# how the d x c input lies in memory
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda X: X.contiguous(),
    "transposed": lambda X: X.mT.contiguous().mT,
    "every-other-column": lambda X: X.repeat_interleave(2, dim=-1)[..., ::2],
    "every-other-row": lambda X: X.repeat_interleave(2, dim=-2)[..., ::2, :],
    "batch-last": lambda X: X.movedim(0, -1).contiguous().movedim(-1, 0),
}

each_structure = pytest.mark.parametrize("name", STRUCTURES)
each_dim = pytest.mark.parametrize("d", DIMS)


def random_matrix(
    name: str, d: int, batch: tuple[int, ...] = (), dtype: torch.dtype = torch.float64
) -> StructuredMatrix:
    """Draw every stored number that is not a zero by structure: no symmetry."""
    cls = structure_class(name)
    K, pattern = (
        cls.zeros(d, batch=batch, dtype=dtype),
        cls.from_dense(torch.ones(d, d)),
    )
    for (_, tensor), (_, free) in zip(
        K.named_tensors(), pattern.named_tensors(), strict=True
    ):
        tensor.copy_(torch.randn(tensor.shape) * (free != 0))
    return K


def dense(K: StructuredMatrix) -> Tensor:
    """Return the dense equivalent in float64."""
    return K.to_dense().double()


def project(name: str, S: Tensor) -> Tensor:
    """Return the twin's Pi(S) for a batch of matrices."""
    if S.ndim == 2:
        return PROJECTIONS[name](S)
    return torch.stack([project(name, M) for M in S])


def assert_close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Compare in the Frobenius norm, within the dtype's tolerance."""
    assert result.shape == expected.shape
    error = torch.linalg.vector_norm(result.double() - expected).item()
    assert error <= TOLERANCES[dtype] * torch.linalg.vector_norm(expected).item()


def draw_all(name: str, d: int) -> Iterator[tuple[StructuredMatrix, torch.dtype]]:
    """Yield a random matrix of every batch shape and dtype."""
    for batch, dtype in product(BATCHES, TOLERANCES):
        yield random_matrix(name, d, batch, dtype), dtype


def test_every_documented_name_has_its_own_class() -> None:
    assert tuple(SUPPORTED_STRUCTURES) == DOCUMENTED_STRUCTURES
    assert len(set(map(structure_class, STRUCTURES))) == len(STRUCTURES)
    for name, cls in SUPPORTED_STRUCTURES.items():
        assert issubclass(cls, StructuredMatrix)
        assert structure_class(name) is cls


# --- names with sizes -----------------------------------------------------------------
def test_equal_names_have_the_same_class() -> None:
    assert structure_class("block64diagonal") is structure_class("block64diagonal")
    assert structure_class("block64diagonal") is not structure_class("block6diagonal")
    assert block_diagonal(30) is SUPPORTED_STRUCTURES["block30diagonal"]
    assert hierarchical(15, 15) is SUPPORTED_STRUCTURES["hierarchical15_15"]
    # a class that is dropped from the cache of names is made once all the same
    structure_class.cache_clear()
    assert structure_class("hierarchical8_4") is hierarchical(8, 4)
    assert structure_class("hierarchical8_4") is not hierarchical(4, 8)


@pytest.mark.parametrize(
    "name",
    [
        "blockdiagonal",
        "block0diagonal",
        "block-3diagonal",
        "block07diagonal",
        "block7.5diagonal",
        "block1000000diagonal",
        "block7diagonal ",
        "block\u0667diagonal",
        "hierarchical8",
        "hierarchical8_",
        "hierarchical0_8",
        "hierarchical8_0",
        "hierarchical8_8_8",
        "hierarchical8_8\n",
        "Dense",
        "",
    ],
)
def test_other_names_are_refused_with_all_that_there_are(name: str) -> None:
    with pytest.raises(ValueError, match="A structure must be one of") as caught:
        structure_class(name)
    message = str(caught.value)
    assert all(known in message for known in DOCUMENTED_STRUCTURES)
    assert "'block<size>diagonal'" in message
    assert "'hierarchical<top>_<bottom>'" in message
    assert repr(name) in message


@each_structure
@pytest.mark.parametrize(
    "duplicate", [deepcopy, lambda K: pickle.loads(pickle.dumps(K))]
)
def test_a_matrix_can_be_copied_and_pickled(
    name: str, duplicate: Callable[[StructuredMatrix], StructuredMatrix]
) -> None:
    K = random_matrix(name, 31, (2,))
    other = duplicate(K)
    assert type(other) is type(K)
    assert torch.equal(other.to_dense(), K.to_dense())
    other.shift_(1.0)
    assert not torch.equal(other.to_dense(), K.to_dense())


def test_the_largest_size_stands_for_dense() -> None:
    K = structure_class("block999999diagonal").eye(5)
    assert torch.equal(K.matmul(K).to_dense(), torch.eye(5))


# --- the definition -------------------------------------------------------------------
def layout_dense(f: dict[str, Tensor], d: int) -> Tensor:
    """Place the fields of one dense matrix."""
    return f["mat"]


def layout_diagonal(f: dict[str, Tensor], d: int) -> Tensor:
    """Place the fields of one diagonal matrix."""
    M = torch.zeros(d, d, dtype=torch.float64)
    for i in range(d):
        M[i, i] = f["diag"][i]
    return M


def layout_blocks(f: dict[str, Tensor], d: int, size: int) -> Tensor:
    """Place the fields of one block-diagonal matrix."""
    M = torch.zeros(d, d, dtype=torch.float64)
    blocks = [*f["blocks"], f["last"]]
    assert [len(b) for b in blocks] == [size] * (d // size) + [d % size]
    for i, block in enumerate(blocks):
        rows = slice(size * i, size * i + len(block))
        M[rows, rows] = block
    return M


def layout_hierarchy(f: dict[str, Tensor], d: int, top: int, bottom: int) -> Tensor:
    """Place the fields of one hierarchical matrix."""
    M = torch.zeros(d, d, dtype=torch.float64)
    end = max(d - bottom, min(d, top))  # the first row of E
    M[:top], M[end:] = f["dense"][:top], f["dense"][top:]
    assert not M[end:, :top].any()
    for i, c in enumerate(f["middle"], start=top):
        M[i, i] = c
    return M


def layout_triltoeplitz(f: dict[str, Tensor], d: int) -> Tensor:
    """Place the field of one lower-triangular Toeplitz matrix."""
    M = torch.zeros(d, d, dtype=torch.float64)
    for j in range(d):
        M += torch.diag(f["coeffs"][j].expand(d - j), -j)
    return M


def layout_triutoeplitz(f: dict[str, Tensor], d: int) -> Tensor:
    """Place the field of one upper-triangular Toeplitz matrix."""
    return layout_triltoeplitz(f, d).T


PLACED: dict[str, Callable[[dict[str, Tensor], int], Tensor]] = {
    "dense": layout_dense,
    "diagonal": layout_diagonal,
    "block30diagonal": partial(layout_blocks, size=30),
    "block7diagonal": partial(layout_blocks, size=7),
    "hierarchical15_15": partial(layout_hierarchy, top=15, bottom=15),
    "hierarchical3_2": partial(layout_hierarchy, top=3, bottom=2),
    "triltoeplitz": layout_triltoeplitz,
    "triutoeplitz": layout_triutoeplitz,
}


@each_structure
@each_dim
def test_to_dense_places_every_field_where_the_definition_says(
    name: str, d: int
) -> None:
    for batch in ((), (3,), (2, 2)):
        K = random_matrix(name, d, batch)
        matrices = K.to_dense()
        assert matrices.shape == (*batch, d, d)
        for index in product(*map(range, batch)):
            fields = {n: t[index] for n, t in K.named_tensors()}
            assert torch.equal(matrices[index], PLACED[name](fields, d))


@each_structure
@each_dim
def test_from_dense_is_the_twins_projection(name: str, d: int) -> None:
    for batch, dtype in product(BATCHES, TOLERANCES):
        S = torch.randn(*batch, d, d).to(dtype)
        S = S + S.mT
        result = structure_class(name).from_dense(S)
        assert {t.dtype for _, t in result.named_tensors()} == {dtype}
        assert_close(dense(result), project(name, S.double()), dtype)


@each_structure
@each_dim
def test_the_projection_keeps_the_trace(name: str, d: int) -> None:
    S = random_matrix("dense", d, (3,)).to_dense()
    S = S + S.mT
    trace = dense(structure_class(name).from_dense(S)).diagonal(dim1=-2, dim2=-1)
    expected = S.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert torch.allclose(trace.sum(-1), expected, rtol=0, atol=1e-12 * max(d, 1))


# --- products, projections and their scales -------------------------------------------
@each_structure
@each_dim
def test_products_with_columns_agree_with_dense(name: str, d: int) -> None:
    for (K, dtype), c, scale in product(draw_all(name, d), COLUMNS, SCALES):
        X = torch.randn(*K.batch_shape, d, c).to(dtype)
        before = X.clone()
        KX, KTX = K.matmat(X, scale=scale), K.rmatmat(X, scale=scale)
        assert KX.dtype == KTX.dtype == dtype
        assert_close(KX, scale * dense(K) @ X.double(), dtype)
        assert_close(KTX, scale * dense(K).mT @ X.double(), dtype)
        assert torch.equal(X, before)


@each_structure
@each_dim
def test_project_gram_agrees_with_dense(name: str, d: int) -> None:
    for batch, c, dtype in product(BATCHES, COLUMNS, TOLERANCES):
        X = torch.randn(*batch, d, c).to(dtype)
        before, gram = X.clone(), project(name, X.double() @ X.double().mT)
        for scale in SCALES:
            result = structure_class(name).project_gram(X, scale=scale)
            assert {t.dtype for _, t in result.named_tensors()} == {dtype}
            assert result.shape == (*batch, d, d)
            assert_close(dense(result), scale * gram, dtype)
        assert torch.equal(X, before)


@each_structure
@each_dim
def test_gram_agrees_with_dense(name: str, d: int) -> None:
    for K, dtype in draw_all(name, d):
        before, gram = K.to_dense(), project(name, dense(K).mT @ dense(K))
        for scale in SCALES:
            result = K.gram(scale=scale)
            assert type(result) is type(K)
            assert {t.dtype for _, t in result.named_tensors()} == {dtype}
            assert_close(dense(result), scale * gram, dtype)
        assert torch.equal(K.to_dense(), before)


@each_structure
@each_dim
def test_a_product_of_two_stays_inside_the_structure(name: str, d: int) -> None:
    for K, dtype in draw_all(name, d):
        L = random_matrix(name, d, tuple(K.batch_shape), dtype)
        KL = K.matmul(L)
        assert type(KL) is type(K)
        assert {t.dtype for _, t in KL.named_tensors()} == {dtype}
        assert_close(dense(KL), dense(K) @ dense(L), dtype)


@each_structure
@each_dim
def test_outer_is_the_exact_product_or_declined(name: str, d: int) -> None:
    for K, dtype in draw_all(name, d):
        KKT, kind = K.outer(), type(K).outer_structure(d, dtype)
        assert (KKT is None) == (kind is None)
        if KKT is not None:
            assert type(KKT) is kind
            assert_close(dense(KKT), dense(K) @ dense(K).mT, dtype)
        if "hierarchical" in name:  # not closed under transposition
            assert KKT is None
        elif "toeplitz" not in name:
            assert type(KKT) is type(K)


@each_structure
@each_dim
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strided_inputs_give_what_contiguous_ones_give(
    name: str, d: int, layout: str
) -> None:
    K = random_matrix(name, d, (3,))
    X = torch.randn(3, d, 5, dtype=torch.float64)
    view = LAYOUTS[layout](X)
    assert torch.equal(view, X)
    cls = structure_class(name)
    assert_close(K.matmat(view), dense(K) @ X, torch.float64)
    assert_close(K.rmatmat(view), dense(K).mT @ X, torch.float64)
    assert_close(dense(cls.project_gram(view)), project(name, X @ X.mT), torch.float64)
    # one column, repeated without a copy
    one = X[..., :1].expand(3, d, 5)
    gram = project(name, one @ one.mT)
    assert_close(dense(cls.project_gram(one)), gram, torch.float64)
    assert_close(K.matmat(one), dense(K) @ one, torch.float64)


@each_structure
def test_a_transposed_matrix_of_a_batch_is_treated_by_itself(name: str) -> None:
    K, X = random_matrix(name, 31, (3,)), torch.randn(3, 31, 5, dtype=torch.float64)
    together, both = K.matmat(X), K.matmul(K)
    for i in range(3):
        one = type(K)(*(t[i] for _, t in K.named_tensors()))
        assert_close(together[i], one.matmat(X[i]), torch.float64)
        assert_close(dense(both)[i], dense(one.matmul(one)), torch.float64)


# --- what is derived ------------------------------------------------------------------
@each_structure
@each_dim
def test_eye_zeros_and_shapes(name: str, d: int) -> None:
    cls = structure_class(name)
    makers = ((cls.zeros, torch.zeros(d, d)), (cls.eye, torch.eye(d)))
    for (make, expected), batch, dtype in product(makers, BATCHES, TOLERANCES):
        K = make(d, batch=batch, dtype=dtype)
        assert K.dim == d
        assert K.shape == (*batch, d, d)
        assert isinstance(K.shape, torch.Size)
        assert K.batch_shape == batch
        assert K.to_dense().dtype == dtype
        assert torch.equal(dense(K), expected.double().expand(*batch, d, d))
        for _, tensor in K.named_tensors():
            assert tensor.dtype == dtype
            assert tensor.shape[: len(batch)] == batch


@each_structure
def test_zeros_take_torchs_default_dtype(name: str) -> None:
    K = structure_class(name).zeros(7)
    assert K.to_dense().dtype == torch.get_default_dtype()


NUMBERS: dict[str, Callable[[int], int]] = {
    "dense": lambda d: d * d,
    "diagonal": lambda d: d,
    "block30diagonal": lambda d: (d // 30) * 30**2 + (d % 30) ** 2,
    # 30 dense rows, of which 15 begin with 15 zeros that are stored, too
    "hierarchical15_15": lambda d: min(d, 30) * d + max(d - 30, 0),
    "triltoeplitz": lambda d: d,
    "triutoeplitz": lambda d: d,
    "block7diagonal": lambda d: (d // 7) * 7**2 + (d % 7) ** 2,
    "hierarchical3_2": lambda d: min(d, 5) * d + max(d - 5, 0),
}


@each_structure
@each_dim
def test_num_stored_counts_the_numbers_of_the_definition(name: str, d: int) -> None:
    K = random_matrix(name, d, (3,))
    stored = sum(t.numel() for _, t in K.named_tensors())
    assert stored == 3 * NUMBERS[name](d) == 3 * type(K).num_stored(d)


@each_structure
@each_dim
def test_reductions_agree_with_dense(name: str, d: int) -> None:
    for K, dtype in draw_all(name, d):
        M = dense(K)
        accumulates = torch.promote_types(dtype, torch.float32)
        assert K.norm().dtype == accumulates
        # on a CPU, the norm of each row of bfloat16 numbers is rounded
        rounding = dtype if dtype == torch.bfloat16 else accumulates
        assert_close(K.norm(), (M**2).sum((-2, -1)).sqrt(), rounding)
        largest = M.abs().flatten(-2).amax(-1) if d else torch.zeros(K.batch_shape)
        assert torch.equal(K.max_abs().double(), largest.double())
        spectral = torch.linalg.matrix_norm(M, 2) if d else largest
        slack = 1 + 4 * torch.finfo(dtype).eps
        assert K.spectral_norm().dtype == accumulates
        assert bool((K.spectral_norm() <= slack * spectral).all())
        assert K.probe().isfinite().all()


@each_structure
@pytest.mark.parametrize("size", [1e-12, 1e18])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_spectral_norm_grows_with_the_matrix(
    name: str, size: float, dtype: torch.dtype
) -> None:
    K = random_matrix(name, 12, (3,)).map(lambda t: t.to(dtype))
    far = K.map(
        lambda t: t * size
    )  # as after a gradient that is a million times larger
    torch.testing.assert_close(
        far.spectral_norm() / size, K.spectral_norm(), rtol=0.02, atol=0.0
    )


@each_structure
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_spectral_norm_that_leaves_the_range_is_infinite_not_zero(
    name: str, dtype: torch.dtype
) -> None:
    K = random_matrix(name, 12, (3,)).map(lambda t: (t * 1e30).to(dtype))
    spectral = torch.linalg.matrix_norm(dense(K), 2)
    found = K.spectral_norm()
    assert bool((found > 0.3 * spectral).all())


@each_structure
@each_dim
def test_the_spectral_norm_of_what_factors_learn_is_hardly_missed(
    name: str, d: int
) -> None:
    draw = torch.Generator().manual_seed(d)
    X = torch.randn(5, d, 3, generator=draw) * torch.logspace(-1, 1, 5)[:, None, None]
    m = structure_class(name).project_gram(X).shift_(-0.5)
    norm = torch.linalg.matrix_norm(m.to_dense(), 2) if d else torch.zeros(5)
    # what is below 1 limits no step
    assert bool((norm <= 2.5 * m.spectral_norm().clamp(min=1.0)).all())


@each_structure
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gram_that_is_not_finite_is_seen(name: str, poison: float) -> None:
    X = torch.randn(3, 61, 5)
    X[1, 40, 2] = poison
    cls = structure_class(name)
    sick = cls.project_gram(X)
    assert sick.probe().isfinite().tolist() == [True, False, True]
    assert cls.eye(61, batch=(2,)).probe().isfinite().all()


@each_structure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_of_half_precision_count_beyond_its_mantissa(
    name: str, dtype: torch.dtype
) -> None:
    # bfloat16 stops counting ones at 256, float16 overflows at 65504
    K = structure_class(name).eye(3000, dtype=dtype)
    K.add_(K, 15.0)
    assert K.norm().item() == pytest.approx(16.0 * 3000**0.5, rel=1e-6)


@each_structure
@each_dim
def test_diagonals_are_writable_views_of_exactly_the_diagonal(
    name: str, d: int
) -> None:
    for K, dtype in draw_all(name, d):
        before = dense(K)
        owned = {t.untyped_storage().data_ptr() for _, t in K.named_tensors()}
        for view in K.diagonals():
            assert view.untyped_storage().data_ptr() in owned
            assert view.shape[: len(K.batch_shape)] == K.batch_shape
            view.add_(1.0)
        assert_close(dense(K), before + torch.eye(d).double(), dtype)
        for view in K.diagonals():
            view.zero_()
        off_diagonal = before - before.diagonal(dim1=-2, dim2=-1).diag_embed()
        assert torch.equal(dense(K), off_diagonal)


@each_structure
@each_dim
def test_add_works_in_place(name: str, d: int) -> None:
    for K, dtype in draw_all(name, d):
        L = random_matrix(name, d, tuple(K.batch_shape), dtype)
        expected = dense(K) - 0.5 * dense(L)
        tensors = [t for _, t in K.named_tensors()]
        K.add_(L, -0.5)
        assert all(a is b for a, (_, b) in zip(tensors, K.named_tensors(), strict=True))
        assert_close(dense(K), expected, dtype)


@each_structure
def test_fields_cannot_be_rebound(name: str) -> None:
    K = random_matrix(name, 7)
    (field, tensor), *_ = K.named_tensors()
    with pytest.raises(FrozenInstanceError):
        setattr(K, field, tensor)


# --- no slow fallback -----------------------------------------------------------------
PRIMITIVES = sorted(StructuredMatrix.__abstractmethods__)


def test_the_documented_primitives_are_abstract() -> None:
    documented = {"dim", "matmul", "matmat", "rmatmat", "project_gram", "gram"}
    assert documented | {"diagonals"} <= set(PRIMITIVES)


@pytest.mark.parametrize("missing", PRIMITIVES)
def test_a_structure_that_lacks_a_primitive_cannot_be_instantiated(
    missing: str,
) -> None:
    complete = vars(structure_class("diagonal"))
    members = {n: complete[n] for n in PRIMITIVES}
    fields = {"__annotations__": {"diag": Tensor}, "__match_args__": ("diag",)}
    init = {"__init__": complete["__init__"]}
    whole = type("Whole", (StructuredMatrix,), members | fields | init)
    assert whole.eye(3).to_dense().equal(torch.eye(3))
    del members[missing]
    partial = type("Partial", (StructuredMatrix,), members | fields | init)
    with pytest.raises(TypeError, match=missing):
        partial(torch.ones(3))


# --- processors without instructions for half precision -------------------------------
HALF = (torch.float16, torch.bfloat16)


class ProductsOf(TorchDispatchMode):
    """Record the types of numbers that matrix products are taken of."""

    NAMES = frozenset(f"aten::{n}" for n in ("mm", "bmm", "addmm", "baddbmm", "mv"))

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what it is given."""
        if func.name().partition(".")[0].rstrip("_") in self.NAMES:
            self.dtypes |= {t.dtype for t in args if isinstance(t, Tensor)}
        return func(*args, **(kwargs or {}))


@each_structure
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("batch", [(), (3,)], ids=str)
def test_a_processor_that_cannot_multiply_half_precision_widens_it(
    name: str,
    dtype: torch.dtype,
    batch: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    K, L = (random_matrix(name, 31, batch, dtype) for _ in range(2))
    changes = ["add_product_"]
    if K.HAS_SYMMETRIC:
        K.symmetrize_(), L.symmetrize_()
        changes.append("transform_")
    X = torch.randn(*batch, 31, 5).to(dtype)

    def results() -> dict[str, Tensor]:
        found = {key: run() for key, run in operations(K, X).items()}
        found["damped_gram"] = K.damped_gram(X, scale=0.5, damping=0.3)
        ways = {"float": -0.5, "tensor": torch.full(batch, -0.5)}
        for way, alpha in ways.items():
            for change in changes:
                copy = K.map(torch.clone)
                found[f"{change}, {way}"] = getattr(copy, change)(L, alpha)
        return {
            key: dense(value) if isinstance(value, StructuredMatrix) else value.double()
            for key, value in found.items()
            if value is not None
        }

    both = {}
    for widened in ((), HALF):
        monkeypatch.setattr("sirfshampoo.structures.products._WIDENED", widened)
        with ProductsOf() as products:
            both[widened] = results()
        if widened:
            assert not products.dtypes & set(HALF)
        elif name in ("dense", "block30diagonal"):
            assert dtype in products.dtypes
    for key, expected in both[()].items():
        assert_close(both[HALF][key], expected, dtype)


# --- cost -----------------------------------------------------------------------------
def operations(
    K: StructuredMatrix, X: Tensor
) -> dict[str, Callable[[], Tensor | StructuredMatrix | None]]:
    """Everything that an optimizer's step does with a structured matrix."""
    L = K.map(torch.clone)
    return {
        "project_gram": lambda: type(K).project_gram(X, scale=0.5),
        "matmat": lambda: K.matmat(X, scale=0.5),
        "rmatmat": lambda: K.rmatmat(X, scale=0.5),
        "gram": lambda: K.gram(scale=0.5),
        "matmul": lambda: K.matmul(L),
        "outer": K.outer,
        "norm": K.norm,
        "probe": K.probe,
        "max_abs": K.max_abs,
        "spectral_norm": K.spectral_norm,
        "add_": lambda: L.add_(K, 0.5),
        "zeros": lambda: type(K).zeros(K.dim),
        "eye": lambda: type(K).eye(K.dim),
    }


@pytest.mark.parametrize("name", [n for n in STRUCTURES if n != "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_temporary_has_the_size_of_a_dense_matrix(
    name: str, dtype: torch.dtype, largest_tensor: LargestTensor
) -> None:
    d = 6000
    K = random_matrix(name, d, dtype=dtype)
    X = torch.randn(d, 1).to(dtype)
    for operation, run in operations(K, X).items():
        with largest_tensor:
            run()
        assert largest_tensor.numbers <= 100 * d, operation


def test_the_measurement_of_temporaries_sees_a_dense_matrix(
    largest_tensor: LargestTensor,
) -> None:
    with largest_tensor:
        torch.ones(500, 1) @ torch.ones(1, 500)
    assert largest_tensor.numbers == 500**2


@pytest.mark.parametrize("name", ["triltoeplitz", "triutoeplitz"])
def test_toeplitz_products_of_6000_rows_take_no_second(name: str) -> None:
    K, X = random_matrix(name, 6000, dtype=torch.float32), torch.randn(6000, 1)
    for operation, run in operations(K, X).items():
        times = []
        for _ in range(5):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        # one product of dense matrices of that size takes seconds
        assert min(times) < 0.2, (operation, times)
