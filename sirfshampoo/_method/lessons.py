"""What factors learn from an update, small ones of many tensors together.

Small matrices cost their calls, not their operations: those of equal structure and size
are put into one batch, whatever tensors and axes they belong to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sirfshampoo._method.rows import LARGEST_FLOAT16, each
from sirfshampoo.structures import StructuredMatrix
from sirfshampoo.structures.base import accumulation_dtype

#: Factors of at most so many numbers, all rows together, are small. On a CPU, copies
#: into a batch and back cost more beyond; elsewhere, where calls cost more, a guess.
_SMALL = {"cpu": 1 << 15}
_SMALL_ELSEWHERE = 1 << 20

#: How many times as many numbers the factors in a batch have at most: what is copied
#: should take little memory and, on a CPU, stay in the caches.
_AT_ONCE = 8


class Manner(NamedTuple):
    """How factors learn.

    Attributes:
        times: How often K is multiplied onto a gradient; where it is once, K is
            symmetric, and stays so.
        beta2: Learning rate of the factors.
        alpha2: Riemannian momentum.
        clamp: Which norm of m limits the step of K, ``"frobenius"`` or ``"spectral"``.
    """

    times: int
    beta2: float
    alpha2: float
    clamp: str


class Lesson(NamedTuple):
    """What the factors of an axis are to learn.

    Attributes:
        K: The factors, ``[rows, d, d]``; written in place.
        m: Their Riemannian momenta; written in place. None: there are none.
        s: What m averages; overwritten.
        learns: A mask ``[rows]``; where it is False, K and m stay as they are. None:
            all rows learn.
        scratch: Memory for what is needed on the way, of K's kind; not asked for where
            there are momenta, since s is free then. None: there is none.
        manner: How they learn.
    """

    K: StructuredMatrix
    m: StructuredMatrix | None
    s: StructuredMatrix
    learns: Tensor | None
    scratch: StructuredMatrix | None
    manner: Manner

    @property
    def kind(self) -> Any:
        """What lessons in one batch have in common."""
        layout = tuple([t.shape[1:] for t in self.K.tensors()])
        kind = (type(self.K), layout, self.K.dtype, self.K.device, self.manner)
        return (*kind, self.m is None, self.learns is None)


def is_small(K: StructuredMatrix) -> bool:
    """Return whether factors learn faster together with those of other tensors."""
    return _numbers(K) <= _limit(K)


def _numbers(K: StructuredMatrix) -> int:
    """Return how many numbers factors have in all rows."""
    return sum([t.numel() for t in K.tensors()])


def _limit(K: StructuredMatrix) -> int:
    """Return how many small factors have at most, where these lie."""
    return _SMALL.get(K.device.type, _SMALL_ELSEWHERE)


def learn(lesson: Lesson) -> None:
    """Update K and m in place."""
    K, m, s, learns, scratch, (times, beta2, alpha2, clamp) = lesson
    # m ← alpha2 · m + (1 − alpha2) · s
    weight: float | Tensor = 1 - alpha2
    if learns is not None:
        s.clear_(~learns)
        weight = learns.to(accumulation_dtype(s.dtype)) * weight
    if m is None:
        m = s
    else:
        m.lerp_(s, weight)
        scratch = s
    # change = −½ times · beta2 / max(1, ‖m‖)
    size = m.spectral_norm() if clamp == "spectral" else m.norm()
    rate = size.clamp_(min=1.0).reciprocal_()
    if learns is not None:
        rate *= learns
    (change,) = each(rate.mul_(-beta2 * times / 2).unsqueeze(0))
    if times == 2:
        # K ← K + change · K m
        K.add_product_(m, change, scratch=scratch)
    else:
        # K ← E K E with E = I + change · m
        K.transform_(m, change, scratch=scratch)
    if K.dtype == torch.float16:
        # without damping, K grows as long as gradients vanish
        K.copy_(K.scale((LARGEST_FLOAT16 / K.max_abs()).clamp(max=1.0)))


def learn_together(lessons: Iterable[Lesson]) -> None:
    """Update K and m of all lessons in place, those of one kind at once."""
    if torch.compiler.is_compiling():  # it joins calls by itself
        for lesson in lessons:
            learn(lesson)
        return
    for first, *others in _batches(lessons):
        if others:
            _learn_at_once([first, *others])
        else:
            learn(first)


def _batches(lessons: Iterable[Lesson]) -> list[list[Lesson]]:
    """Return lessons of one kind together, as many as there is room for."""
    found: list[list[Lesson]] = []
    open_ones: dict[Any, tuple[list[Lesson], int]] = {}
    for lesson in lessons:
        kind, size = lesson.kind, _numbers(lesson.K)
        batch, numbers = open_ones.get(kind, ([], 0))
        if not batch or numbers + size > _AT_ONCE * _limit(lesson.K):
            batch, numbers = [], 0
            found.append(batch)
        batch.append(lesson)
        open_ones[kind] = batch, numbers + size
    return found


def _learn_at_once(lessons: Sequence[Lesson]) -> None:
    """Update K and m of lessons of one kind, on copies."""
    K = [lesson.K for lesson in lessons]
    m = [lesson.m for lesson in lessons if lesson.m is not None]
    masks = [lesson.learns for lesson in lessons if lesson.learns is not None]
    whole = Lesson(
        _concatenated(K),
        _concatenated(m) if m else None,
        _concatenated([lesson.s for lesson in lessons]),
        torch.cat(masks) if masks else None,
        scratch=None,
        manner=lessons[0].manner,
    )
    learn(whole)
    _write_back(K, whole.K)
    if whole.m is not None:
        _write_back(m, whole.m)


def _concatenated(matrices: Sequence[StructuredMatrix]) -> StructuredMatrix:
    """Return one batch of the rows of all matrices."""
    fields = zip(*(matrix.tensors() for matrix in matrices), strict=True)
    return type(matrices[0])(*map(torch.cat, fields))


def _write_back(matrices: Sequence[StructuredMatrix], whole: StructuredMatrix) -> None:
    """Copy the rows of a batch to the matrices that it was joined from."""
    fields = zip(*(matrix.tensors() for matrix in matrices), strict=True)
    for parts, joined in zip(fields, whole.tensors(), strict=True):
        rows = [len(part) for part in parts]
        torch._foreach_copy_(parts, joined.split(rows))
