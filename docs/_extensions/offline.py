"""Stops the build where a page would load anything from the network."""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

LOADED = (
    re.compile(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"'](?:https?:)?//[^\"']+"),
    re.compile(r"<link\b[^>]*\bhref=[\"'](?:https?:)?//[^\"']+"),
)
"""What a page loads by itself; links that a reader may follow are none of it."""

IN_STYLES = re.compile(r"(?:url\([\"']?|@import\s+[\"'])(?:https?:)?//[^\"')]+")


def check(app: Sphinx, error: Exception | None) -> None:
    """Look into every page and style sheet."""
    if error is not None:
        return
    for path in sorted(Path(app.outdir).rglob("*")):
        looks = {".html": LOADED, ".css": (IN_STYLES,)}.get(path.suffix, ())
        text = path.read_text("utf-8") if looks else ""
        for look in looks:
            for match in look.finditer(text):
                name = path.relative_to(app.outdir)
                logger.warning("%s loads %s", name, match[0][-80:])


def setup(app: Sphinx) -> dict[str, bool]:
    """Check what was written."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
