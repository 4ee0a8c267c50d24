"""Whether a tensor lies where Python runs, or the host has to wait to see it."""

from __future__ import annotations

from torch import Tensor


def is_at_hand(tensor: Tensor) -> bool:
    """Return whether looking at a number of the tensor costs no wait.

    So it is on a CPU. An accelerator works behind the host, which may not ask for
    numbers: a step that did would wait, and could not be captured as a CUDA graph.
    """
    return tensor.device.type == "cpu"
