"""When the factors are updated, where that is not the same all along."""

from __future__ import annotations

from dataclasses import dataclass

from sirfshampoo._config import check_count

__all__ = ["GrowingInterval"]


@dataclass(frozen=True)
class GrowingInterval:
    """A ``T`` that grows with the step: min(max(⌊√step / 3⌋, 1), T).

    Factors have the most to learn at the start. With ``SIRFShampoo(...,
    T=GrowingInterval(10))`` they are updated in each of the first 37 steps, then in
    every second, from step 81 on in every third, from step 900 on in every tenth. It
    answers from the step alone, so that training resumes exactly.

    In the first 400 steps, `GrowingInterval(10)` makes 133 updates.

    Attributes:
        T: The longest interval.

    Raises:
        ValueError: If `T` is not an integer > 0.
    """

    T: int

    def __post_init__(self) -> None:
        """Check the argument."""
        check_count("T", self.T)

    def __call__(self, step: int) -> bool:
        """Return whether the factors are to be updated in a step (from 0)."""
        start = 0  # the first update at this interval
        for interval in range(1, self.T):
            grows_at = 9 * (interval + 1) ** 2
            if step < grows_at:
                return step >= start and (step - start) % interval == 0
            # the first update from there on
            start += -((start - grows_at) // interval) * interval
        return step >= start and (step - start) % self.T == 0
