"""What the contestants are trained on: data, network, loss, batch and steps."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import models
from benchmarks.training.data import CONTEXT, Data, load

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From inputs, the network's output and targets to a mean over examples."""


@dataclass(frozen=True)
class Task:
    """A problem to train on.

    Attributes:
        title: What it is, in words.
        data: Name of the data set.
        model: Makes the network for a data set.
        loss: What is minimized.
        batch_size: Examples in a batch.
        steps: How long a run is.
    """

    title: str
    data: str
    model: Callable[[Data], nn.Module]
    loss: Loss
    batch_size: int
    steps: int

    @property
    def has_classes(self) -> bool:
        """Whether an accuracy can be told."""
        return self.loss is cross_entropy

    def load(self) -> Data:
        """Return the data."""
        return load(self.data)


def cross_entropy(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Compare classes; the mean is over all axes but the last."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def reconstruction(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Sum squared errors over the pixels of an image."""
    return (outputs - inputs.flatten(1)).square().sum(-1).mean()


def squares(inputs: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Average squared errors."""
    return F.mse_loss(outputs, targets)


def accuracy(outputs: Tensor, targets: Tensor) -> float:
    """Return the percentage of right classes."""
    return 100 * (outputs.argmax(-1) == targets).float().mean().item()


def _transformer(width: int, layers: int) -> Callable[[Data], nn.Module]:
    def make(data: Data) -> nn.Module:
        return models.Transformer(data.classes, CONTEXT, width, layers)

    return make


TASKS: dict[str, Task] = {
    "transformer": Task(
        "2-layer character transformer, width 64, Python's help texts",
        data="text",
        model=_transformer(width=64, layers=2),
        loss=cross_entropy,
        batch_size=32,
        steps=400,
    ),
    "digits-cnn": Task(
        "small CNN, digits",
        data="digits",
        model=lambda _: models.digits_cnn(),
        loss=cross_entropy,
        batch_size=128,
        steps=90,
    ),
    "regression": Task(
        "linear regression, condition number 1e4",
        data="regression",
        model=lambda _: models.linear(64, 16),
        loss=squares,
        batch_size=64,
        steps=400,
    ),
    "autoencoder": Task(
        "autoencoder, digits",
        data="digits",
        model=lambda _: models.autoencoder(),
        loss=reconstruction,
        batch_size=128,
        steps=1000,
    ),
    "digits-mlp": Task(
        "MLP, digits",
        data="digits",
        model=lambda _: models.digits_mlp(),
        loss=cross_entropy,
        batch_size=128,
        steps=300,
    ),
    "mnist-cnn": Task(
        "CNN, 5,000 MNIST images",
        data="mnist",
        model=lambda _: models.mnist_cnn(),
        loss=cross_entropy,
        batch_size=64,
        steps=300,
    ),
    "transformer-128": Task(
        "4-layer character transformer, width 128, Python's help texts",
        data="text",
        model=_transformer(width=128, layers=4),
        loss=cross_entropy,
        batch_size=32,
        steps=400,
    ),
    "mnist-resnet": Task(
        "small ResNet, 5,000 MNIST images",
        data="mnist",
        model=lambda data: models.ResNet(data.classes),
        loss=cross_entropy,
        batch_size=64,
        steps=200,
    ),
    "lstm": Task(
        "character LSTM, width 128, Python's help texts",
        data="text",
        model=lambda data: models.LSTM(data.classes, width=128),
        loss=cross_entropy,
        batch_size=32,
        steps=400,
    ),
    "logistic": Task(
        "logistic regression, digits",
        data="centered digits",
        model=lambda data: models.linear(64, data.classes),
        loss=cross_entropy,
        batch_size=128,
        steps=300,
    ),
    "logistic-rotated": Task(
        "logistic regression, rotated digits",
        data="rotated digits",
        model=lambda data: models.linear(64, data.classes),
        loss=cross_entropy,
        batch_size=128,
        steps=300,
    ),
}
"""What `--task` accepts; a new task joins with one line."""

QUICK = ("digits-cnn", "regression", "digits-mlp", "logistic", "logistic-rotated")
"""What `--quick` trains on."""
