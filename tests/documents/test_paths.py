"""Every path, every make target and every module that the documents name exists."""

import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted(p for p in ROOT.glob("docs/**/*.md") if "_build" not in p.parts),
    *sorted(ROOT.glob("benchmarks/*.md")),
]
MADE = (
    ".venv/",
    "_build/",
    "build/",
    "dist/",
    "docs/gallery/",
    "gallery/",
    "out/",
    "site/",
)
"""What commands make: it need not be there."""

SUFFIXES = (".cff", ".json", ".md", ".png", ".py", ".toml", ".txt")
"""What ends like this is a file, whatever stands before."""

BLOCK = re.compile(r"^```[^\n]*\n.*?^```|(?:^ {4}[^\n]*(?:\n|\Z))+", re.M | re.S)
SPAN = re.compile(r"`[^`]+`")
LINK = re.compile(r"\]\(([^)\s#]+)[^)]*\)")
WORD = re.compile(r"(?<![\w./:-])[\w.*-][\w./*-]*")
COMMAND = r"(?:^|[`(;&|])[ $]*(?:\w+=\S+ )*"
MAKE = re.compile(COMMAND + r"make\s+([a-z][\w-]*)", re.M)
MODULE = re.compile(r"\bpython[\d.]*\s+-m\s+([\w.]+)")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M))

Missing = Iterator[tuple[int, str]]
"""Where it is named, counted in characters, and what it is."""


def missing_in(page: Path, text: str) -> list[str]:
    """Return, as ``page:line: what``, all that a page names and that does not exist."""
    blocks = list(BLOCK.finditer(text))
    prose = BLOCK.sub(_blank, text)
    spans = list(SPAN.finditer(prose))
    found = list(_missing_links(SPAN.sub(_blank, prose), page.parent))
    for code in blocks + spans:
        for look in (_missing_paths, _missing_targets, _missing_modules):
            found += [
                (code.start() + i, what) for i, what in look(code[0], page.parent)
            ]
    name = page.relative_to(ROOT)
    lines = [(text.count("\n", 0, i) + 1, what) for i, what in sorted(found)]
    return [f"{name}:{line}: no {what}" for line, what in lines]


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def _exists(path: str, folder: Path) -> bool:
    """Return whether a path leads anywhere from a folder; ``*`` stands for anything."""
    if "*" in path:
        return any(folder.glob(path))
    return (folder / path).is_dir() if path[-1] == "/" else (folder / path).exists()


DRAWN = re.compile(r".*results/.*\.png")
"""What is drawn from results; a source distribution comes without."""


def _missing_links(prose: str, folder: Path) -> Missing:
    for link in LINK.finditer(prose):
        drawn = DRAWN.fullmatch(link[1]) and not (ROOT / ".git").exists()
        made = drawn or link[1].startswith(MADE)
        if ":" not in link[1] and not made and not _exists(link[1], folder):
            yield link.start(1), f"path {link[1]}"


def _missing_paths(code: str, folder: Path) -> Missing:
    """Look from the page's folder, from the root, and from the folders of a tree.

    Where a line starts with a folder (``name/``), deeper lines below it lie in there.
    """
    start, tree = 0, [(-2, folder), (-1, ROOT)]
    for line in code.splitlines(keepends=True):
        indent = len(line) - len(line.lstrip())
        if line.strip():
            tree = [(depth, place) for depth, place in tree if depth < indent]
        for word in WORD.finditer(line):
            path = word[0].rstrip(".")
            if word.start() == indent and path.endswith("/"):
                tree.append((indent, tree[-1][1] / path))
            places = [place for _, place in tree]
            if _is_path(path, places) and not any(_exists(path, p) for p in places):
                yield start + word.start(), f"path {path}"
        start += len(line)


def _is_path(word: str, places: list[Path]) -> bool:
    """Return whether a word must lead anywhere."""
    if word.startswith(MADE):
        return False
    first, slash, rest = word.partition("/")
    starts = bool(slash) and any((place / first).exists() for place in places)
    return starts or (bool(slash) and not rest) or word.endswith(SUFFIXES)


def _missing_targets(code: str, folder: Path) -> Missing:
    for target in MAKE.finditer(code):
        if target[1] not in TARGETS:
            yield target.start(1), f"target `make {target[1]}`"


def _missing_modules(code: str, folder: Path) -> Missing:
    """Ours must be there to run; of others, the package must be installed."""
    for module in MODULE.finditer(code):
        first, path = module[1].partition(".")[0], module[1].replace(".", "/")
        if (ROOT / first).is_dir():
            files = (ROOT / f"{path}.py", ROOT / path / "__main__.py")
            found = any(file.exists() for file in files)
        else:
            found = find_spec(first) is not None
        if not found:
            yield module.start(1), f"module {module[1]}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    assert missing_in(page, page.read_text("utf-8")) == []


WRONG = """# A page
`README.md`, `sirfshampoo/_upd.py` (once `make test`) and [a link](docs/gone.md#part),
[this one](docs/from_adamw.md) is right; `a/b` is no path, `build/x.json` is made, `make
bnech` is two lines long; https://pypi.org/gone.md, `benchmarks/results/*.json`.

    make check    # then `make chekc`
    FOO=1 python -m benchmarks.stepp && python -m benchmarks.step
    python -m benchmrks.step examples/demmo.py examples/demo.py

```python
optimizer.step()  # as in `benchmarks/stepp/`
```

    sirfshampoo/
      optimizer.py   ties `_engine/step.py` and `_engine/gone.py` together
      gone/
        base.py
      structures/    base.py, gone.py
    constraints.txt
"""


def test_what_is_wrong_is_named_with_its_line() -> None:
    assert missing_in(ROOT / "page.md", WRONG) == [
        "page.md:2: no path sirfshampoo/_upd.py",
        "page.md:2: no path docs/gone.md",
        "page.md:4: no target `make bnech`",
        "page.md:6: no target `make chekc`",
        "page.md:7: no module benchmarks.stepp",
        "page.md:8: no module benchmrks.step",
        "page.md:8: no path examples/demmo.py",
        "page.md:11: no path benchmarks/stepp/",
        "page.md:15: no path _engine/gone.py",
        "page.md:16: no path gone/",
        "page.md:17: no path base.py",
        "page.md:18: no path gone.py",
    ]


def test_a_page_may_name_what_lies_beside_it() -> None:
    text = "`spaces.py`, `training/spaces.py`, `training/gone.py`, [x](../README.md)"
    page = ROOT / "benchmarks" / "page.md"
    assert missing_in(page, text) == [
        "benchmarks/page.md:1: no path spaces.py",
        "benchmarks/page.md:1: no path training/gone.py",
    ]
