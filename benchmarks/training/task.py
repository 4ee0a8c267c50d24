"""What a task is, and the losses that several have."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training.data import Data, load
from benchmarks.training.parts import Part

Loss = Callable[[Tensor, Any, Tensor], Tensor]
"""From inputs, the network's output and targets to a mean over examples."""


def cross_entropy(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare classes; the mean is over all axes but the last."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Task:
    """A problem to train on.

    Attributes:
        title: What it is, in words.
        data: Name of the data set.
        model: Makes the network for a data set.
        loss: What is minimized, and reported.
        batch_size: Examples in a batch.
        steps: How long a run is.
        held_out: Whether the recipe was never looked at on it: it is only run at the
            end, and its numbers stand as they come.
        objective: What training minimizes instead, from the network and a batch.
    """

    title: str
    data: str
    model: Callable[[Data], nn.Module]
    batch_size: int
    steps: int
    loss: Loss = cross_entropy
    held_out: bool = False
    objective: Callable[[nn.Module, Part], Tensor] | None = None

    @property
    def has_classes(self) -> bool:
        """Whether an accuracy can be told."""
        return self.loss is cross_entropy

    def load(self) -> Data:
        """Return the data."""
        return load(self.data)

    def batch_loss(self, model: nn.Module, batch: Part) -> Tensor:
        """Return what a step of training minimizes."""
        if self.objective is not None:
            return self.objective(model, batch)
        return self.loss(batch.inputs, model(batch.inputs), batch.targets)


def reconstruction(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum squared errors over the pixels of an image."""
    return (outputs - inputs.flatten(1)).square().sum(-1).mean()


def squares(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Average squared errors."""
    return F.mse_loss(outputs, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the percentage of right classes."""
    return 100 * (outputs.argmax(-1) == targets).float().mean().item()
