"""Factors learn the same alone and in a batch with those of other tensors."""

from collections.abc import Iterator
from itertools import product

import pytest
import torch

from sirfshampoo import SIRFShampoo
from sirfshampoo._engine import step
from sirfshampoo._method import lessons
from sirfshampoo._method.lessons import Lesson, Manner, learn, learn_together
from sirfshampoo.structures import StructuredMatrix, structure_class
from tests.cases import STRUCTURES, SYMMETRIC

ROWS = (1, 3, 2)
TOLERANCES = {torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def spread(name: str, rows: int, d: int, dtype: torch.dtype) -> StructuredMatrix:
    """Return a batch of symmetric matrices near the identity."""
    X = torch.randn(rows, d, d, dtype=torch.float64) / d
    cls = structure_class(name)
    return cls.from_dense(X @ X.mT + torch.eye(d, dtype=torch.float64)).map(
        lambda t: t.to(dtype)
    )


def draw(name: str, manner: Manner, dtype: torch.dtype, masked: bool) -> list[Lesson]:
    """Return lessons of two sizes, of every second with a mask if asked for."""
    torch.manual_seed(0)
    return [
        Lesson(
            spread(name, rows, d, dtype),
            spread(name, rows, d, dtype) if manner.alpha2 else None,
            spread(name, rows, d, dtype),
            torch.arange(rows) % 2 == 0 if masked and i % 2 == 0 else None,
            None,
            manner,
        )
        for i, (d, rows) in enumerate(product((16, 9), ROWS))
    ]


def learned(found: list[Lesson]) -> Iterator[torch.Tensor]:
    """Yield what lessons have written."""
    for lesson in found:
        for matrix in (lesson.K, lesson.m):
            yield from matrix.tensors() if matrix is not None else ()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("alpha2", [0.0, 0.5])
@pytest.mark.parametrize("clamp", ["frobenius", "spectral"])
@pytest.mark.parametrize(
    ("name", "times"),
    [*((name, 2) for name in STRUCTURES), *((name, 1) for name in SYMMETRIC)],
)
def test_factors_learn_the_same_alone_and_together(
    name: str, times: int, clamp: str, alpha2: float, masked: bool
) -> None:
    manner = Manner(times, 0.3, alpha2, clamp)
    for dtype, tolerance in TOLERANCES.items():
        alone, together = (draw(name, manner, dtype, masked) for _ in range(2))
        for lesson in alone:
            learn(lesson)
        learn_together(together)
        for one, other in zip(learned(alone), learned(together), strict=True):
            torch.testing.assert_close(other, one, rtol=tolerance, atol=tolerance)
        before = draw(name, manner, dtype, masked)
        for old, new in zip(before, together, strict=True):
            assert not torch.equal(old.K.to_dense(), new.K.to_dense())


@pytest.mark.parametrize("name", SYMMETRIC)
def test_what_does_not_learn_stays_as_it_is(name: str) -> None:
    manner = Manner(1, 0.3, 0.5, "spectral")
    for lesson in (found := draw(name, manner, torch.float32, masked=True)):
        if lesson.learns is not None:
            lesson.s.tensors()[0][~lesson.learns] = float("nan")
    before = draw(name, manner, torch.float32, masked=True)
    learn_together(found)
    for old, new in zip(before, found, strict=True):
        for one, other in ((old.K, new.K), (old.m, new.m)):
            assert one is not None
            assert other is not None
            mask = torch.zeros(len(one.tensors()[0]), dtype=torch.bool)
            if old.learns is not None:
                mask = ~old.learns
            assert torch.equal(other.to_dense()[mask], one.to_dense()[mask])
            assert not (other.to_dense() == one.to_dense())[~mask].all()


def test_small_factors_wait_and_large_ones_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting: list[int] = []

    def count(found: list[Lesson]) -> None:
        waiting.extend(lesson.K.dim for lesson in found)

    monkeypatch.setattr(step, "learn_together", count)
    p = torch.nn.Parameter(torch.randn(200, 40))
    p.grad = torch.randn(200, 40)
    SIRFShampoo([p], batch_size=1).step()
    assert waiting == [40]


def test_factors_of_one_kind_take_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def count(lesson: Lesson) -> None:
        taken.append(lesson.K.batch_shape.numel())

    monkeypatch.setattr(lessons, "learn", count)
    learn_together(draw("dense", Manner(1, 0.3, 0.5, "spectral"), torch.float32, False))
    assert taken == [sum(ROWS), sum(ROWS)]


def test_copies_of_factors_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def count(lesson: Lesson) -> None:
        taken.append(lesson.K.batch_shape.numel())

    monkeypatch.setattr(lessons, "learn", count)
    monkeypatch.setitem(lessons._SMALL, "cpu", 16 * 16)
    monkeypatch.setattr(lessons, "_AT_ONCE", 4)
    manner = Manner(1, 0.3, 0.5, "spectral")
    found = draw("dense", manner, torch.float32, False)
    learn_together([lesson for lesson in found if lesson.K.dim == 16] * 2)
    assert taken == [sum(ROWS[:2]), sum(ROWS[2:]) + ROWS[0], sum(ROWS[1:2]), ROWS[2]]
