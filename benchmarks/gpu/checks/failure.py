"""What is told of an error: where it was raised, from which lines of ours, on what."""

import traceback
from pathlib import Path
from types import FrameType

from benchmarks.environment import ROOT

OURS = 2  # frames
LENGTH = 900


def tell(error: Exception) -> str:
    """Describe an error in one line of text, with what its message leaves out.

    A compiler that fails says neither which line of its input it was at nor on which
    of its nodes: both are found in the frames that it left.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    places = traceback.extract_tb(error.__traceback__)
    inner = places[-1]
    parts = [f"{type(error).__name__} at {Path(inner.filename).name}:{inner.lineno}"]
    if inner.line:
        parts.append(f"in `{inner.line}`")
    if (node := _node(frames)) is not None:
        parts.append(f"on node {node}")
    ours = [p for p in places if _is_ours(Path(p.filename))][-OURS:]
    lines = (f"{Path(p.filename).name}:{p.lineno} `{p.line}`" for p in reversed(ours))
    return f"{' '.join(parts)}, from {', '.join(lines)}: {error}"[:LENGTH]


def _is_ours(path: Path) -> bool:
    """Return whether a file is of this project, and not of what is installed in it."""
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _node(frames: list[FrameType]) -> str | None:
    """Return the name of the compiler's node that the innermost frame is about."""
    for frame in reversed(frames):
        if "_inductor" not in frame.f_code.co_filename:
            continue
        found = frame.f_locals
        for key in ("self", "snode", "node", "node1"):
            name = getattr(found.get(key), "get_name", None)
            if callable(name):
                return f"{name()} ({type(found[key]).__name__})"
    return None
