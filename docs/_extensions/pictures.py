"""Draws what each structure can hold, from the structures themselves."""

from pathlib import Path

import torch
from sphinx.application import Sphinx

from benchmarks import report
from benchmarks.results import RESULTS
from sirfshampoo.structures import StructuredMatrix, structure_class

SHOWN = {
    "dense": "dense",
    "diagonal": "diagonal",
    "block30diagonal": "block10diagonal",
    "hierarchical15_15": "hierarchical5_5",
    "triltoeplitz": "triltoeplitz",
    "triutoeplitz": "triutoeplitz",
}
"""Structures, and the same with sizes that fit a picture of 32 rows."""

ROWS = 32


def example(name: str) -> torch.Tensor:
    """Return a matrix of a structure that has learned a little."""
    structure: type[StructuredMatrix] = structure_class(name)
    generator = torch.Generator().manual_seed(1)
    walk = torch.randn(ROWS, 4 * ROWS, generator=generator).cumsum(0)
    K = structure.eye(ROWS).scale(2.5)
    K.add_(structure.project_gram(walk, scale=0.6 / (4 * ROWS)), alpha=-0.3)
    return K.to_dense()


def draw(path: Path) -> None:
    """Draw all structures side by side; grey is what is always zero."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = pyplot.get_cmap("RdBu_r").with_extremes(bad="0.82")
    figure, axes = pyplot.subplots(2, 3, figsize=(8.4, 6.2), layout="constrained")
    for ax, (title, name) in zip(axes.flat, SHOWN.items(), strict=True):
        K = example(name)
        K = K.masked_fill(K == 0, torch.nan)
        top = K[~K.isnan()].abs().max()
        ax.imshow(K, cmap=colors, vmin=-top, vmax=top, interpolation="none")
        shown = "" if title == name else f"\n(here {name})"
        ax.set_title(title + shown, fontsize=11)
        ax.set(xticks=[], yticks=[])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def prepare(app: Sphinx) -> None:
    """Draw the structures, and of the results what is not there."""
    draw(Path(app.srcdir) / "_build" / "structures.png")
    list(report.draw(RESULTS, missing=True))


def setup(app: Sphinx) -> dict[str, bool]:
    """Draw before pages are read."""
    app.connect("builder-inited", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
