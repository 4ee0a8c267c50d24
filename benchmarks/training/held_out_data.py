"""The data of the held-out tasks: made, of scikit-learn, or Python's own source."""

import math
import platform
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.training import actor_critic
from benchmarks.training.parts import Data, cut_text, split

USERS, ITEMS = 600, 400
LENGTH = 50  # of the sequences of the adding problem
SHORT, LONG = 64, 128  # characters in a window of source code
LONG_WINDOWS = 64  # on which a loss is taken: they are longer, and the networks larger
MODULES = (
    *("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "difflib"),
    *("doctest", "enum", "fractions", "functools", "heapq", "inspect", "ipaddress"),
    *("locale", "mailbox", "optparse", "_pydecimal", "pdb", "pickle", "pprint"),
    *("shutil", "smtplib", "socket", "statistics", "subprocess", "tarfile"),
    *("textwrap", "threading", "tokenize", "traceback", "typing", "unittest.mock"),
    *("urllib.request", "uuid", "weakref", "zipfile"),
)
"""Of the standard library, in the order in which they are read."""


def _friedman() -> Data:
    """Make Friedman's first function with noise; its targets are about 14, not 0."""
    from sklearn.datasets import make_friedman1

    inputs, targets = make_friedman1(20_000, noise=1.0, random_state=0)
    return split(
        torch.tensor(inputs, dtype=torch.float32),
        torch.tensor(targets, dtype=torch.float32).unsqueeze(-1),
        val=2000,
        test=2000,
        origin=f"Friedman's first function of scikit-learn {version('scikit-learn')}",
    )


def _ratings() -> Data:
    """Make ratings of about 3.5: a constant, users, items, eight tastes and noise."""
    generator = torch.Generator().manual_seed(3)
    n, tastes = 30_000, 8

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    cells = torch.randperm(USERS * ITEMS, generator=generator)[:n]  # none twice
    user, item = cells // ITEMS, cells % ITEMS
    products = normal(USERS, tastes)[user] * normal(ITEMS, tastes)[item]
    ratings = 3.5 + 0.3 * normal(USERS)[user] + 0.3 * normal(ITEMS)[item]
    ratings += 0.7 * products.sum(-1) / math.sqrt(tastes) + 0.3 * normal(n)
    origin = f"made: {n:,} ratings by {USERS} users of {ITEMS} items"
    return split(
        torch.stack([user, item], -1), ratings, val=3000, test=3000, origin=origin
    )


def _boundary_problem() -> Data:
    """Draw points in which u'' = -π² sin πx is to hold; the targets are sin πx."""
    points = torch.rand(2000, 1, generator=torch.Generator().manual_seed(4))
    origin = "made: points between 0 and 1"
    return split(points, (math.pi * points).sin(), val=500, test=500, origin=origin)


def _adding() -> Data:
    """Make sequences of numbers and marks; the two that are marked are to be added."""
    generator = torch.Generator().manual_seed(5)
    n, half = 11_000, LENGTH // 2
    numbers = torch.rand(n, LENGTH, generator=generator)
    first = torch.randint(half, (n,), generator=generator)
    second = torch.randint(half, LENGTH, (n,), generator=generator)
    marks, rows = torch.zeros(n, LENGTH), torch.arange(n)
    marks[rows, first] = marks[rows, second] = 1
    return split(
        torch.stack([numbers, marks], -1),
        (numbers * marks).sum(-1, keepdim=True),
        val=500,
        test=500,
        origin=f"made: {n:,} adding problems of length {LENGTH}",
    )


def _some_digits(lowest: int) -> Callable[[], Data]:
    """Keep five of the ten digits."""

    def make() -> Data:
        from sklearn.datasets import load_digits

        raw = load_digits()
        targets = torch.tensor(raw.target) - lowest
        kept = (targets >= 0) & (targets < 5)
        images = torch.tensor(raw.images, dtype=torch.float32)[kept] / 16
        origin = f"digits {lowest} to {lowest + 4} of scikit-learn "
        origin += version("scikit-learn")
        data = split(images, targets[kept], val=150, test=150, origin=origin)
        return replace(data, classes=5)

    return make


def _source(context: int, windows: int) -> Callable[[], Data]:
    """Read the source of some modules; what is not ASCII counts as one character."""

    def make() -> Data:
        texts = []
        for name in MODULES:
            spec = find_spec(name)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"This Python lacks the source of {name}.")
            texts.append(Path(spec.origin).read_text(encoding="utf-8"))
        text = "".join(texts).encode("ascii", "replace").decode()
        origin = f"{len(MODULES)} modules of Python {platform.python_version()}"
        return cut_text(text, context, origin, windows)

    return make


SETS: dict[str, Callable[[], Data]] = {
    "friedman": _friedman,
    "ratings": _ratings,
    "boundary problem": _boundary_problem,
    "adding": _adding,
    "starts": actor_critic.starts,
    "low digits": _some_digits(0),
    "high digits": _some_digits(5),
    "source": _source(SHORT, windows=256),
    "long source": _source(LONG, windows=LONG_WINDOWS),
}
