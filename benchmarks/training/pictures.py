"""Draws the curves of a task: test loss by step, and by second."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.optimizers import OURS
from benchmarks.training.summary import Entry, entries


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Write a picture with a line for each contestant, and a band over its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(
        1, 2, figsize=(10, 4.2), sharey=True, layout="constrained"
    )
    found = [e for e in entries(result) if e.curves()]
    for number, e in enumerate(found):
        ours = e.record["builder"] in OURS
        style = {
            "color": pyplot.get_cmap("tab20")(number % 20),
            "linewidth": 2.2 if ours else 1.4,
            "linestyle": "-" if ours else "--",
            "label": e.title,
        }
        line(axes[0], e, e.points, style)
        if e.seconds is not None:
            line(axes[1], e, e.seconds, style)
    lowest = min((min(map(min, e.curves())) for e in found), default=1.0)
    highest = max((e.curves()[0][0] for e in found), default=1.0)
    if lowest > 0:
        axes[0].set_yscale("log")
        axes[0].set_ylim(0.9 * lowest, 1.1 * highest)
    axes[0].yaxis.set_major_formatter("{x:g}")
    if highest < 20 * lowest:  # else the powers of ten are enough
        axes[0].yaxis.set_minor_formatter("{x:.3g}")
    else:
        axes[0].yaxis.set_minor_formatter(ticker.NullFormatter())
    label(axes, "seconds of training, one thread")
    figure.suptitle(result["title"])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def label(axes: Any, seconds: str) -> None:
    """Say what the two halves of a picture show."""
    axes[0].set(xlabel="steps", ylabel="test loss", title="by step")
    axes[1].set(xlabel=seconds, title="by the clock")
    for ax in axes:
        ax.set_xlim(left=0)
        ax.grid(which="both", alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)


def line(ax: Any, e: Entry, xs: Any, style: Mapping[str, Any]) -> None:
    """Draw the mean over seeds, and the band from the lowest to the highest."""
    columns = list(zip(*e.curves(), strict=True))
    ax.plot(xs, e.curve(), **style)
    lows, highs = [min(c) for c in columns], [max(c) for c in columns]
    ax.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)
