"""Data sets in three parts, and how numbers and texts are cut into them."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

WINDOWS = 256  # of a text, at most, that a loss is taken on


@dataclass(frozen=True)
class Part:
    """Examples: inputs [n, ...] and targets [n, ...]."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
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


def split(
    inputs: Tensor, targets: Tensor, val: int, test: int, origin: str, seed: int = 0
) -> Data:
    """Shuffle and cut; the sets are sorted by digit, or by writer."""
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))
    whole = Part(inputs, targets)
    cut = len(inputs) - val - test
    parts = [whole.rows(rows) for rows in order.split([cut, val, test])]
    return Data(*parts, origin, digest(inputs, targets))


def digest(*tensors: Tensor) -> str:
    """Shorten numbers to twelve digits."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(tensor.contiguous().numpy().tobytes())
    return hasher.hexdigest()[:12]


def cut_text(text: str, context: int, origin: str, windows: int = WINDOWS) -> Data:
    """Learn from the first nine tenths, and keep the rest in turns.

    Characters are the classes, `context` of them are in a window, and a loss is taken
    on so many windows at most.
    """
    index = {char: i for i, char in enumerate(sorted(set(text)))}
    stream = torch.tensor([index[char] for char in text])
    # All windows with the character that follows: a view, [len - context, context + 1].
    every = stream.unfold(0, context + 1, 1)
    cut = int(0.9 * len(every))
    later = every[cut + context :: context]  # these share nothing with the first
    parts = [every[:cut], *(_spread(later[i::2], windows) for i in (0, 1))]
    origin += f", {len(text):,} characters, {len(index)} different"
    cut_up = [Part(part[:, :-1], part[:, 1:]) for part in parts]
    return Data(*cut_up, origin, digest(stream), classes=len(index))


def _spread(windows: Tensor, most: int) -> Tensor:
    """Keep at most so many, evenly spread."""
    rows = torch.linspace(0, len(windows) - 1, min(most, len(windows))).long()
    return windows[rows].contiguous()
