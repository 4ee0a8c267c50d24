"""Every structure agrees with its dense definition, at a cost of what it stores."""

from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError
from itertools import product
from time import perf_counter

import pytest
import torch
from cases import STRUCTURES
from conftest import LargestTensor
from torch import Tensor
from twin import PROJECTIONS

from sirfshampoo.structures import SUPPORTED_STRUCTURES
from sirfshampoo.structures.base import StructuredMatrix

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
    cls = SUPPORTED_STRUCTURES[name]
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
    assert tuple(SUPPORTED_STRUCTURES) == STRUCTURES
    assert len(set(SUPPORTED_STRUCTURES.values())) == len(STRUCTURES)
    assert all(issubclass(c, StructuredMatrix) for c in SUPPORTED_STRUCTURES.values())


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


def layout_block30diagonal(f: dict[str, Tensor], d: int) -> Tensor:
    """Place the fields of one block-diagonal matrix."""
    M = torch.zeros(d, d, dtype=torch.float64)
    blocks = [*f["blocks"], f["last"]]
    assert [len(b) for b in blocks] == [30] * (d // 30) + [d % 30]
    for i, block in enumerate(blocks):
        M[30 * i : 30 * i + len(block), 30 * i : 30 * i + len(block)] = block
    return M


def layout_hierarchical15_15(f: dict[str, Tensor], d: int) -> Tensor:
    """Place the fields of one hierarchical matrix."""
    M = torch.zeros(d, d, dtype=torch.float64)
    end = max(d - 15, min(d, 15))  # the first row of E
    M[:15], M[end:] = f["dense"][:15], f["dense"][15:]
    assert not M[end:, :15].any()
    for i, c in enumerate(f["middle"], start=15):
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


PLACED = {name: globals()[f"layout_{name}"] for name in STRUCTURES}


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
        result = SUPPORTED_STRUCTURES[name].from_dense(S)
        assert {t.dtype for _, t in result.named_tensors()} == {dtype}
        assert_close(dense(result), project(name, S.double()), dtype)


@each_structure
@each_dim
def test_the_projection_keeps_the_trace(name: str, d: int) -> None:
    S = random_matrix("dense", d, (3,)).to_dense()
    S = S + S.mT
    trace = dense(SUPPORTED_STRUCTURES[name].from_dense(S)).diagonal(dim1=-2, dim2=-1)
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
            result = SUPPORTED_STRUCTURES[name].project_gram(X, scale=scale)
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
        KKT = K.outer()
        if name in ("dense", "diagonal", "block30diagonal"):
            assert type(KKT) is type(K)
            assert_close(dense(KKT), dense(K) @ dense(K).mT, dtype)
        else:  # not closed under transposition
            assert KKT is None


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
    cls = SUPPORTED_STRUCTURES[name]
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
    cls = SUPPORTED_STRUCTURES[name]
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
    K = SUPPORTED_STRUCTURES[name].zeros(7)
    assert K.to_dense().dtype == torch.get_default_dtype()


NUMBERS: dict[str, Callable[[int], int]] = {
    "dense": lambda d: d * d,
    "diagonal": lambda d: d,
    "block30diagonal": lambda d: (d // 30) * 30**2 + (d % 30) ** 2,
    # 30 dense rows, of which 15 begin with 15 zeros that are stored, too
    "hierarchical15_15": lambda d: min(d, 30) * d + max(d - 30, 0),
    "triltoeplitz": lambda d: d,
    "triutoeplitz": lambda d: d,
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
        assert K.is_finite().all()


@each_structure
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_gram_that_is_not_finite_is_seen(name: str, poison: float) -> None:
    X = torch.randn(3, 61, 5)
    X[1, 40, 2] = poison
    cls = SUPPORTED_STRUCTURES[name]
    sick = cls.project_gram(X)
    assert sick.is_finite().tolist() == [True, False, True]
    assert cls.eye(61, batch=(2,)).is_finite().all()


@each_structure
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_norm_of_half_precision_count_beyond_its_mantissa(
    name: str, dtype: torch.dtype
) -> None:
    # bfloat16 stops counting ones at 256, float16 overflows at 65504
    K = SUPPORTED_STRUCTURES[name].eye(3000, dtype=dtype)
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
    complete = vars(SUPPORTED_STRUCTURES["diagonal"])
    members = {n: complete[n] for n in PRIMITIVES}
    fields = {"__annotations__": {"diag": Tensor}, "__match_args__": ("diag",)}
    init = {"__init__": complete["__init__"]}
    whole = type("Whole", (StructuredMatrix,), members | fields | init)
    assert whole.eye(3).to_dense().equal(torch.eye(3))
    del members[missing]
    partial = type("Partial", (StructuredMatrix,), members | fields | init)
    with pytest.raises(TypeError, match=missing):
        partial(torch.ones(3))


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
        "is_finite": K.is_finite,
        "max_abs": K.max_abs,
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
def test_toeplitz_products_of_6000_rows_take_milliseconds(name: str) -> None:
    K, X = random_matrix(name, 6000, dtype=torch.float32), torch.randn(6000, 1)
    for operation, run in operations(K, X).items():
        times = []
        for _ in range(5):
            start = perf_counter()
            run()
            times.append(perf_counter() - start)
        # one product of dense matrices of that size takes seconds
        assert min(times) < 0.02, (operation, times)
