"""The page on errors has every message of the package, and none that is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "errors.md"
WITHOUT_TEXT = {"…"}
"""Messages that are all of a value: a missing key, and what another function words."""

MEMORY = "SIRFShampoo needs … on …, where … are free. The largest axes: …"
"""The one message that a function of its own words."""

GENERAL = "Argument '…' must be …, got …"
"""Of which each check of a number says what it must be."""


def text_of(node: ast.expr) -> str:
    """Return a string as it is written, with … for what depends on a call."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            text_of(v) if isinstance(v, ast.Constant) else "…" for v in node.values
        )
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return "…"


def messages_in(tree: ast.AST) -> Iterator[str]:
    """Yield what is raised and what is warned of."""
    for node in ast.walk(tree):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call) or not call.args:
            continue
        name = getattr(call.func, "id", getattr(call.func, "attr", ""))
        if isinstance(node, ast.Raise) or name in ("tell", "warn"):
            yield text_of(call.args[0])


def messages() -> list[str]:
    """Return all messages of the package."""
    files = sorted((ROOT / "sirfshampoo").rglob("*.py"))
    found = {m for f in files for m in messages_in(ast.parse(f.read_text("utf-8")))}
    return sorted((found | {MEMORY}) - WITHOUT_TEXT)


def shown() -> list[str]:
    """Return the messages of the page."""
    rows = re.findall(r"^\| (.+?) \|", PAGE.read_text("utf-8"), re.MULTILINE)
    return [row for row in rows if row != "message" and not row.startswith("---")]


def fits(row: str, message: str) -> bool:
    """Return whether a line of the page is a message, or its beginning.

    What depends on a call may be longer or shorter on either side.
    """
    if row.startswith("A child class must implement"):  # said of three methods
        return message.startswith("A child class must implement")
    if row == GENERAL:  # else it would be all of them
        return message == f"{GENERAL}."
    words = [re.escape(part) for part in re.split("…", row.removesuffix("…").strip())]
    return re.match(".*?".join(words), message, re.DOTALL) is not None


@pytest.mark.parametrize("message", messages(), ids=lambda m: m[:60])
def test_every_message_is_explained(message: str) -> None:
    assert [row for row in shown() if fits(row, message)]


def test_every_line_is_a_message_of_the_package() -> None:
    known = messages()
    assert [r for r in shown() if not any(fits(r, m) for m in known)] == []


def test_what_is_raised_and_warned_of_is_found() -> None:
    code = 'raise ValueError(f"No {x} " "here")\ntell("a" f"{b}c")\nprint("d")\n'
    assert sorted(messages_in(ast.parse(code))) == ["No … here", "a…c"]
    assert fits("No … here", "No … here.")
    assert fits("No …", "No … here.")
    assert not fits("No … there", "No … here.")
