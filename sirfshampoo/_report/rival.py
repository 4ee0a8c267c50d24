"""Whether another distribution installs its files where this one does."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

OURS, OFFICIAL = "sirf-shampoo", "sirfshampoo"


def warn_of_rival() -> None:
    """Warn if the official package is installed, too: they overwrite each other."""
    try:
        found = {name: version(name) for name in (OFFICIAL, OURS)}
    except PackageNotFoundError:  # at most one is: the usual case
        return
    told = " and ".join(f"{name} {number}" for name, number in found.items())
    warnings.warn(
        f"Two distributions provide the package 'sirfshampoo': {told}. Each has "
        f"overwritten files of the other. Run `pip uninstall {OFFICIAL} {OURS}`, then "
        "install the one that you want.",
        stacklevel=3,
    )
