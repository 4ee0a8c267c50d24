"""The rooms of the package: imports go one way, and every file is short."""

import ast
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "sirfshampoo"
ROOMS = (
    "structures",
    "_distributed",
    "combiner",
    "_method",
    "_config",
    "_engine",
    "_report",
    "chooser",
    "recipe",
    "optimizer",
    "summary",
    "__init__",
)
"""From the ground up; each may import those before it."""

ONLY: dict[str, set[str]] = {
    "structures": set(),
    "_distributed": set(),
    "combiner": set(),
    "_method": {"structures"},
    "chooser": {"_config"},
    "recipe": {"_config", "combiner"},
}
"""What the strict ones may import."""

LINES = 400
"""The most that a file may have."""

Imports = dict[str, set[str]]
"""The modules of the package that each of its modules imports, by dotted names."""


def files_of(package: Path) -> dict[str, Path]:
    """Return the file of each module."""
    files = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = file
    return files


def imports_of(package: Path) -> Imports:
    """Read all imports, those within functions and for the type checker, too."""
    files = files_of(package)
    imports: Imports = {module: set() for module in files}
    for module, file in files.items():
        inside = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            imports[module] |= _imported(node, inside, files)
    return imports


def _imported(node: ast.AST, inside: str, files: Collection[str]) -> set[str]:
    """Return the modules that a statement names, itself inside a package."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & set(files)
    if not isinstance(node, ast.ImportFrom):
        return set()
    above = inside.split(".")[: inside.count(".") + 2 - node.level]
    base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
    modules = {f"{base}.{alias.name}" for alias in node.names}
    return {module if module in files else base for module in modules} & set(files)


def circle_in(imports: Imports) -> list[str]:
    """Return modules of which each imports the next, and the last the first."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def room_of(module: str) -> str:
    """Return the folder, or the file at the top, in which a module lies."""
    return [*module.split("."), "__init__"][1]


def wrong_ways(imports: Imports) -> list[str]:
    """Return the imports that go from one room to another that lies above it."""
    wrong = []
    for module, imported in imports.items():
        room = room_of(module)
        allowed = ONLY.get(room, set(ROOMS[: ROOMS.index(room)])) | {room}
        wrong += [f"{module} → {n}" for n in imported if room_of(n) not in allowed]
    return sorted(wrong)


def too_long(package: Path) -> list[str]:
    """Return the modules whose files have too many lines, and how many."""
    lines = {
        m: len(f.read_text("utf-8").splitlines()) for m, f in files_of(package).items()
    }
    return [f"{module}: {number}" for module, number in lines.items() if number > LINES]


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circle_in(imports_of(PACKAGE)) == []


def test_rooms_import_only_what_lies_below_them() -> None:
    imports = imports_of(PACKAGE)
    assert {room_of(module) for module in imports} == set(ROOMS)
    assert wrong_ways(imports) == []


def test_every_file_is_short() -> None:
    assert too_long(PACKAGE) == []


@pytest.fixture
def crooked(tmp_path: Path) -> Path:
    """Build a package that breaks every rule."""
    texts = {
        "__init__.py": "from crooked.optimizer import x\n",
        "optimizer.py": "x = 1\n" * (LINES + 1),
        "combiner.py": "def f():\n    import crooked.structures.base as b\n",
        "recipe.py": "from ._config import checks\nfrom ._method import rows\n",
        "structures/__init__.py": "from torch import nn\n" * LINES,
        "structures/base.py": "from .. import optimizer\n",
        "_distributed/__init__.py": "",
        "_config/__init__.py": "import crooked._config.checks\n",
        "_config/checks.py": "from crooked._config.axes import y\n",
        "_config/axes.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from crooked._config.checks import z\n"
        ),
        "_method/__init__.py": "",
        "_method/rows.py": "from crooked import structures, nothing\n",
    }
    for name, text in texts.items():
        file = tmp_path / "crooked" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "crooked"


def test_what_is_wrong_is_named(crooked: Path) -> None:
    imports = imports_of(crooked)
    first, *rest, last = circle_in(imports)
    assert first == last
    assert {first, *rest} == {"crooked._config.axes", "crooked._config.checks"}
    assert wrong_ways(imports) == [
        "crooked._method.rows → crooked",
        "crooked.combiner → crooked.structures.base",
        "crooked.recipe → crooked._method.rows",
        "crooked.structures.base → crooked.optimizer",
    ]
    assert too_long(crooked) == [f"crooked.optimizer: {LINES + 1}"]
