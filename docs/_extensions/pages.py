"""Brings texts from outside of `docs/` onto the site, and turns links around.

A page that begins with the line `<!-- page: ../CHANGELOG.md -->` shows that file; what
follows is for those who read the page elsewhere.
Links are written so that they lead somewhere in the repository; where what they name
has a page on the site, they lead there.
"""

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/TRAINING.md": "training.md",
    "benchmarks/SPEED.md": "speed.md",
    "benchmarks/NOTES.md": "notes.md",
}
"""Where the texts of the repository stand on the site."""

SECTIONS = {("README.md", "many-devices"): "devices.md"}
"""What became a page of its own."""

WHOLE = re.compile(r"<!-- page: (\S+) -->\n")
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:<]+)(?:#(?P<anchor>[\w-]+))?(?=\))")


def relinked(text: str, source: Path, page: Path, root: Path) -> str:
    """Return a text whose links lead from a page of the site.

    Args:
        text: Markdown.
        source: The file that it is from; its links start there.
        page: The page that shows it.
        root: Of the repository.
    """

    def turn(match: re.Match[str]) -> str:
        target = (source.parent / match["path"]).resolve()
        inside = target.relative_to(root).as_posix()
        own = SECTIONS.get((inside, match["anchor"]))
        anchor = f"#{match['anchor']}" if match["anchor"] and not own else ""
        if own or inside in PAGES:
            target = root / "docs" / (own or PAGES[inside])
        if target.is_dir():
            raise ValueError(f"{source.name} links the folder {inside}.")
        return os.path.relpath(target, page.parent) + anchor

    return LINK.sub(turn, text)


def read(app: Sphinx, name: str, source: list[str]) -> None:
    """Turn the links of a page, and fetch its text if it stands elsewhere."""
    page = Path(app.env.doc2path(name))
    if page.suffix != ".md":
        return
    root = Path(app.srcdir).parent
    whole = WHOLE.match(source[0])
    origin = (page.parent / whole[1]).resolve() if whole else page
    if whole:
        source[0] = origin.read_text("utf-8")
        app.env.note_dependency(str(origin))
    source[0] = relinked(source[0], origin, page, root)


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at every page as it is read."""
    app.connect("source-read", read)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
