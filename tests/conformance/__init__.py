"""The conformance suite: one list of claims that optimizers are tried on.

Every row runs against `SIRFShampoo` and, where it makes sense, against
`torch.optim.AdamW`, which shows what a training loop expects. The README's table is
drawn from the results that `python -m tests.conformance` writes.
"""

from . import (
    batch_size,
    checkpoints,
    compiled,
    copies,
    gradients,
    loop,
    parameters,
    precision,
    schedulers,
)
from .row import CONTESTANTS, OURS, Contestant, Row

__all__ = ["CONTESTANTS", "OURS", "ROWS", "Contestant", "Row"]

_ROOMS = (
    copies,
    schedulers,
    parameters,
    loop,
    batch_size,
    compiled,
    precision,
    checkpoints,
    gradients,
)

ROWS: tuple[Row, ...] = tuple(r for room in _ROOMS for r in room.SECTION.rows)
