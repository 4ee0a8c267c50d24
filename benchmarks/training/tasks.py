"""What the contestants are trained on: data, network, loss, batch and steps."""

from collections.abc import Callable

from torch import nn

from benchmarks.training import held_out, models
from benchmarks.training.data import CONTEXT, Data
from benchmarks.training.task import Task, reconstruction, squares


def _transformer(width: int, layers: int) -> Callable[[Data], nn.Module]:
    def make(data: Data) -> nn.Module:
        return models.Transformer(data.classes, CONTEXT, width, layers)

    return make


TASKS: dict[str, Task] = {
    "transformer": Task(
        "2-layer character transformer, width 64, Python's help texts",
        data="text",
        model=_transformer(width=64, layers=2),
        batch_size=32,
        steps=400,
    ),
    "digits-cnn": Task(
        "small CNN, digits",
        data="digits",
        model=lambda _: models.digits_cnn(),
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
        batch_size=128,
        steps=300,
    ),
    "mnist-cnn": Task(
        "CNN, 5,000 MNIST images",
        data="mnist",
        model=lambda _: models.mnist_cnn(),
        batch_size=64,
        steps=300,
    ),
    "transformer-128": Task(
        "4-layer character transformer, width 128, Python's help texts",
        data="text",
        model=_transformer(width=128, layers=4),
        batch_size=32,
        steps=400,
    ),
    "mnist-resnet": Task(
        "small ResNet, 5,000 MNIST images",
        data="mnist",
        model=lambda data: models.ResNet(data.classes),
        batch_size=64,
        steps=200,
    ),
    "lstm": Task(
        "character LSTM, width 128, Python's help texts",
        data="text",
        model=lambda data: models.LSTM(data.classes, width=128),
        batch_size=32,
        steps=400,
    ),
    "logistic": Task(
        "logistic regression, digits",
        data="centered digits",
        model=lambda data: models.linear(64, data.classes),
        batch_size=128,
        steps=300,
    ),
    "logistic-rotated": Task(
        "logistic regression, rotated digits",
        data="rotated digits",
        model=lambda data: models.linear(64, data.classes),
        batch_size=128,
        steps=300,
    ),
    **held_out.TASKS,
}
"""What `--task` accepts; a new task joins with one line."""

MADE_ON = tuple(name for name, task in TASKS.items() if not task.held_out)
"""The tasks that the recipe was made on."""

HELD_OUT = tuple(name for name, task in TASKS.items() if task.held_out)
"""The tasks that no choice of the recipe was made on."""

QUICK = ("digits-cnn", "regression", "digits-mlp", "logistic", "logistic-rotated")
"""What `--quick` trains on."""
