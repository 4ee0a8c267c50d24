"""What the README shows: one table of at most eight lines, and one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.step import ratio
from benchmarks.gpu.visit import read
from benchmarks.tables import Grid
from benchmarks.training import pictures
from benchmarks.training.spaces import UNIT
from benchmarks.training.summary import Entry, entries, lowest

SHOWN = ("adamw", "muon", "soap", "kl-shampoo", "sirf-recipe", "sirf-recipe-bf16")
"""Contestants, in the order of the lines."""

TASKS = {
    "transformer": "transformer",
    "transformer-128": "wider",
    "lstm": "LSTM",
    "mnist-resnet": "ResNet",
    "autoencoder": "autoencoder",
}
"""Tasks, and the heads of their columns."""

DRAWN = {"adamw": "tab:gray", "muon": "tab:orange", "sirf-recipe": "tab:blue"}
"""Contestants in the picture, and their colours."""

PICTURE_TASK = "transformer"

ON_GPU = (
    "gpt2-small",
    {
        "muon": "Muon",
        "soap": "SOAP, T=10",
        "sirf-recipe": "recipe, float32, T=10",
        "sirf-recipe-bf16": "recipe, bfloat16, T=10",
    },
)
"""What was timed on a GPU, and under which names."""

Result = Mapping[str, Any]


def table(results: Sequence[Result], gpu: Path) -> Grid:
    """Tell what the recipe reaches beside others, and what its step costs.

    Args:
        results: Of the training tasks.
        gpu: The folder of a visit to a GPU; there may have been none.
    """
    tasks = {r["name"]: {e.name: e for e in entries(r)} for r in results}
    tasks = {name: tasks[name] for name in TASKS if name in tasks}
    timed = _on_gpu(gpu)
    header = [
        "test loss",
        *(TASKS[name] for name in tasks),
        "step, CPU",
        "steps to AdamW's best",
    ]
    header += ["step, GPU"] if timed else []
    first = next(iter(tasks.values()))
    lines = []
    for name in SHOWN:
        if name not in first:
            continue
        cells = [first[name].title, *(_loss(found, name) for found in tasks.values())]
        cells += [_step(first, name), _steps_to(first, name)]
        cells += [timed.get(name, "–")] if timed else []
        lines.append(tuple(cells))
    return Grid(tuple(header), lines, [_note(results, bool(timed))])


def _note(results: Sequence[Result], timed: bool) -> str:
    """Say what the columns mean."""
    first = next(r for r in results if r["name"] in TASKS)
    env = first["environment"]
    note = (
        "Means over seeds; all but the recipe had their settings searched on each task "
        "(bold: the lowest). On the transformer: the time of a step beside AdamW's, "
        f"forward and backward pass included ({env['cpu']}, one thread), and the share "
        "of AdamW's steps until AdamW's best loss."
    )
    if remark := (first["clock"] or {}).get("remark"):
        note += f" {remark}"
    if timed:
        note += (
            f" Step, GPU: the optimizer alone on the shapes of {ON_GPU[0]}, in steps "
            "of fused AdamW."
        )
    return note


def _loss(found: Mapping[str, Entry], name: str) -> str:
    """Format a test loss; the lowest of the lines shown is bold."""
    means = {n: found[n].mean("test") for n in SHOWN if n in found}
    if (mean := means.get(name)) is None:
        return "diverged" if name in means else "–"
    text = f"{mean.mean:#.3g}"
    return f"**{text}**" if name == lowest(means) else text


def _step(found: Mapping[str, Entry], name: str) -> str:
    """Format the time of a training step, in AdamW's."""
    own, unit = found[name].ms(), found[UNIT].ms()
    return f"{own / unit:.2f} ×" if own and unit else "–"


def _steps_to(found: Mapping[str, Entry], name: str) -> str:
    """Format when AdamW's best loss is reached, in AdamW's steps to it."""
    target = found[UNIT].best()
    own, unit = found[name].steps_to(target), found[UNIT].steps_to(target)
    share = own / unit if unit else float("inf")
    return "–" if share == float("inf") else f"{100 * share:.0f} %"


def _on_gpu(folder: Path) -> dict[str, str]:
    """Return the time of a step on a GPU, in fused AdamW's, by contestant."""
    result = read(folder / "step.json")
    workload = result.get("workloads", {}).get(ON_GPU[0])
    if workload is None:
        return {}
    found = {c["label"]: c for c in workload["contestants"]}
    cells = {
        name: f"{ratio(found[label]):.1f} ×"
        for name, label in ON_GPU[1].items()
        if label in found and found[label]["rounds"] and not found[label]["error"]
    }
    return cells | {UNIT: "1.0 ×"} if cells else {}


def picture(result: Result, path: Path) -> None:
    """Draw test loss by step and by second, with a band over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2, figsize=(9, 3.4), sharey=True, layout="constrained"
    )
    found = {e.name: e for e in entries(result) if e.curves()}
    for name, color in DRAWN.items():
        e = found.get(name)
        if e is None:
            continue
        width = 2.4 if name.startswith("sirf") else 1.6
        style = {"color": color, "linewidth": width, "label": e.title}
        for ax, xs in ((axes[0], e.points), (axes[1], e.seconds)):
            if xs is not None:
                pictures.line(ax, e, xs, style)
    pictures.label(axes, "seconds of training")
    axes[0].legend(frameon=False)
    figure.suptitle(result["title"], fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
