"""Steps of an optimizer as CUDA graphs: captured once, replayed ever after."""

from collections.abc import Callable, Hashable

import torch

from sirfshampoo import SIRFShampoo


class Eager:
    """Stands in for a graph where there are none: it does the work anew."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


def capture(work: Callable[[], None], device: str) -> "torch.cuda.CUDAGraph | Eager":
    """Capture what is to be done; nothing is done yet."""
    if device == "cpu":
        return Eager(work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph


def warm_up(work: Callable[[], None], device: str) -> None:
    """Do something on a stream of its own, as has to be done before a capture."""
    if device == "cpu":
        work()
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)


class Captured:
    """Takes the steps of an optimizer by graphs, one for each kind of step.

    Gradients must stay where they are. Take the steps of a whole period before, by
    `warm_up`: what is kept from one update of the factors to the next must exist.
    """

    def __init__(
        self, optimizer: SIRFShampoo, kind: Callable[[int], Hashable], device: str
    ) -> None:
        """Capture nothing at first.

        The kind maps the global step to what tells kinds of steps apart: a period's
        step, or whether factors are updated.
        """
        self.optimizer, self.kind, self.device = optimizer, kind, device
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | Eager] = {}

    def step(self) -> None:
        """Take a step."""
        start = self.optimizer.global_step
        kind = self.kind(start)
        if kind not in self.graphs:
            self.graphs[kind] = capture(self.optimizer.step, self.device)
        # a capture has counted a step that nobody took
        self.optimizer.global_step = start
        self.graphs[kind].replay()
        self.optimizer.global_step = start + 1
