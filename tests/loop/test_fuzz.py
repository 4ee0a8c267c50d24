"""Whatever a training loop does, in whatever order, the optimizer computes the same.

A sequence of operations is drawn and run twice: with the optimizer as users have it,
which counts examples by itself, is saved, loaded and copied; and with a reference that
is told each step's gradients and batch size. The batch size is counted here, from the
operations alone.
"""

import pytest
from hypothesis import given, settings

from tests.loop.fuzz.references import OfAPlainLoop
from tests.loop.fuzz.sequences import (
    OPERATIONS,
    Sequence,
    dtypes,
    operation,
    run,
    sequences,
)

WITH_CASTS = [*OPERATIONS, operation("cast", dtype=dtypes)]


@given(sequences(OPERATIONS, longest=30))
def test_any_loop_computes_what_the_twin_computes(sequence: Sequence) -> None:
    run(sequence)


@given(sequences(WITH_CASTS, longest=30))
def test_any_loop_computes_what_a_plain_loop_computes(sequence: Sequence) -> None:
    run(sequence, OfAPlainLoop)


@pytest.mark.heavy
@settings(max_examples=300)
@given(sequences(OPERATIONS, longest=60))
def test_300_long_loops_compute_what_the_twin_computes(sequence: Sequence) -> None:
    run(sequence)
