"""How many examples the gradients in ``.grad`` come from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sirfshampoo._engine.gradients import Mark, are_zero


class Tally:
    """Examples, and the gradients that they were counted for.

    Gradients that the user takes out keep theirs until the next step, and bring them
    along when they are put back.

    Attributes:
        period: Changes whenever the count starts at 0.
    """

    def __init__(self) -> None:
        """Start at 0."""
        self.period = 0
        self._examples = 0
        self._mark = Mark()  # of the gradients that were counted last
        self._aside: tuple[Mark, int] | None = None  # what was taken out

    def of(self, gradients: Sequence[Tensor | None]) -> int:
        """Return the number of examples of present gradients."""
        if self._aside is not None and self._aside[0].are(gradients):
            return self._aside[1]
        return self._examples

    def look(self, gradients: Sequence[Tensor | None]) -> None:
        """Look whether present gradients, to be added to, are those counted for."""
        if self._aside is not None and self._aside[0].are(gradients):
            (_, self._examples), self._aside = self._aside, None
        gone = all(gradient is None for gradient in gradients)
        if gone or (self._examples and self._were_reset(gradients)):
            self.forget(gradients)

    def _were_reset(self, gradients: Sequence[Tensor | None]) -> bool:
        """Return whether someone set them to 0 in place."""
        return not self._mark.holds(gradients) and are_zero(gradients)

    def add(self, examples: int) -> None:
        """Count examples whose gradients have come."""
        self._examples += examples

    def mark(self, gradients: Sequence[Tensor | None]) -> None:
        """Note which gradients all that was added has come to."""
        self._mark = Mark(gradients)

    def forget(self, gradients: Sequence[Tensor | None]) -> None:
        """Start at 0 for present gradients; those before may come back."""
        gone = all(gradient is None for gradient in gradients)
        if gone and self._examples and self._mark.lives():
            self._aside = self._mark, self._examples
        self._examples = 0
        self.period += 1

    def close(self) -> None:
        """Start at 0 for good."""
        self._aside, self._examples = None, 0
        self._mark = Mark()  # else a model could not swap its parameters
        self.period += 1

    def kept_aside(self, gradients: Sequence[Tensor | None]) -> int:
        """Return how many examples may be missing in the count of present gradients.

        They are where gradients were taken out and are still held, and the present ones
        have changed since: what was added by hand cannot be told from a clipped norm.
        """
        if self._aside is None or not self._examples:
            return 0
        mark, examples = self._aside
        if mark.are(gradients):
            return 0 if mark.holds(gradients) else self._examples
        return examples if mark.lives() and not self._mark.holds(gradients) else 0
