"""What the site's own extensions promise; `make docs` builds the site itself."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("sphinx")

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs" / "_extensions"))

import mathml  # noqa: E402
import offline  # noqa: E402
import pages  # noqa: E402
import public_names  # noqa: E402

import sirfshampoo  # noqa: E402

DOCS = ROOT / "docs"


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Gather the warnings of the extensions, which the build turns into errors."""
    told: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *args: told.append(text % args))
    monkeypatch.setattr(public_names, "logger", logger)
    monkeypatch.setattr(offline, "logger", logger)
    return told


@pytest.mark.parametrize(
    ("link", "shown"),
    [
        ("../README.md#many-devices", "devices.md"),
        ("../README.md", "index.md"),
        ("../CHANGELOG.md#different", "changelog.md#different"),
        ("../benchmarks/TRAINING.md#test-losses", "training.md#test-losses"),
        ("../benchmarks/scale.py", "../benchmarks/scale.py"),
        ("structures.md", "structures.md"),
        ("https://arxiv.org/abs/2402.03496", "https://arxiv.org/abs/2402.03496"),
        ("#limits", "#limits"),
    ],
)
def test_links_of_the_repository_lead_to_pages_of_the_site(
    link: str, shown: str
) -> None:
    page = DOCS / "page.md"
    assert pages.relinked(f"a [b]({link}) c", page, page, ROOT) == f"a [b]({shown}) c"


def test_links_of_a_text_from_elsewhere_start_there() -> None:
    text = "[a](NOTES.md) ![b](results/train/lstm.png)"
    source, page = ROOT / "benchmarks" / "TRAINING.md", DOCS / "training.md"
    expected = "[a](notes.md) ![b](../benchmarks/results/train/lstm.png)"
    assert pages.relinked(text, source, page, ROOT) == expected


def test_every_page_has_a_place_in_the_contents() -> None:
    contents = "".join(
        page.read_text("utf-8") for page in sorted(DOCS.glob("**/index.md"))
    ).splitlines()
    names = {line.removesuffix(".md").rpartition("/")[2] for line in contents}
    for page in sorted(DOCS.glob("*.md")):
        assert page.stem in names, f"{page.name} is in no contents"


def test_a_public_name_without_a_place_or_a_text_stops_the_build(
    warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def bare() -> None:
        pass

    monkeypatch.setattr(sirfshampoo, "bare", bare, raising=False)
    monkeypatch.setattr(sirfshampoo, "__all__", [*sirfshampoo.__all__, "bare"])
    known = [name for name, _ in public_names.public_names()]
    known.remove("sirfshampoo.recipe")
    domains = {"py": SimpleNamespace(objects=known)}
    public_names.check(SimpleNamespace(), SimpleNamespace(domains=domains))
    assert warned == [
        "sirfshampoo.recipe is not in the API reference",
        "sirfshampoo.bare has no docstring",
    ]


def test_what_a_page_would_load_from_the_network_stops_the_build(
    warned: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="https://x.org">fine</a><script src="own.js"></script>'
        '<script src="https://cdn.org/x.js"></script><link rel="s" href="//y.org/z">'
    )
    (tmp_path / "b.css").write_text("a { background: url(https://x.org/f.woff) }")
    offline.check(SimpleNamespace(outdir=tmp_path), None)
    assert [told.partition(" ")[0] for told in warned] == ["a.html", "a.html", "b.css"]


def test_formulas_need_no_script() -> None:
    text = mathml._mathml(r"\frac{\beta_2}{\max(1, \|m\|_F)} K^\top", block=True)
    assert text.startswith("<math")
    assert "mfrac" in text
