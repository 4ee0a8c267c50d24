"""What is released: version, contents of sdist and wheel, and who else is installed."""

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import sirfshampoo
from sirfshampoo._report import rival

ROOT = Path(__file__).parents[2]
VERSION = sirfshampoo.__version__


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build both, by the backend itself: nothing is drawn from a network."""
    pytest.importorskip("hatchling")
    pytest.importorskip("hatch_fancy_pypi_readme")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> zipfile.ZipFile:
    """Open the wheel."""
    return zipfile.ZipFile(dist / f"sirf_shampoo-{VERSION}-py3-none-any.whl")


def test_the_version_stands_in_one_place_and_is_the_one_of_the_changelog() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in project["project"]
    assert project["tool"]["hatch"]["version"]["path"] == "sirfshampoo/__init__.py"
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    (first, *_) = re.findall(r"^## \[?(\d+\.\d+\.\d+)\]? - (\S+)$", changelog, re.M)
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert first[0] == VERSION
    assert f"\nversion: {VERSION}\ndate-released: {first[1]}\n" in citation


def test_the_wheel_holds_the_package_and_no_more(wheel: zipfile.ZipFile) -> None:
    info = f"sirf_shampoo-{VERSION}.dist-info"
    names = set(wheel.namelist())
    modules = {
        str(path.relative_to(ROOT)) for path in (ROOT / "sirfshampoo").rglob("*.py")
    }
    about = {f"{info}/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
    licence = {f"{info}/licenses/LICENSE"}
    assert names == modules | about | licence | {"sirfshampoo/py.typed"}
    assert sum(entry.file_size for entry in wheel.infolist()) < 600_000


def test_the_metadata_tells_what_a_registry_shows(wheel: zipfile.ZipFile) -> None:
    info = f"sirf_shampoo-{VERSION}.dist-info"
    told = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert (told["Name"], told["Version"]) == ("sirf-shampoo", VERSION)
    needed = [name for name in told.get_all("Requires-Dist") if "extra ==" not in name]
    assert needed == ["torch>=2.7"]
    assert told["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in told.get_all("Classifier")
    assert told.get_all("Project-URL")
    readme = str(told.get_payload())
    assert readme.startswith("# SIRFShampoo")
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert links
    assert all(link.startswith("https://") for link in links)


def test_the_sdist_holds_what_the_commands_of_the_readme_need(dist: Path) -> None:
    with tarfile.open(dist / f"sirf_shampoo-{VERSION}.tar.gz") as archive:
        members = {m.name.partition("/")[2]: m.size for m in archive.getmembers()}
    for name in (
        "CHANGELOG.md",
        "CITATION.cff",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "benchmarks/results/front.png",
        "benchmarks/results/gpt256.json",
        "constraints.txt",
        "docs/conf.py",
        "docs/_extensions/pages.py",
        "docs/frameworks/index.md",
        "examples/demo.py",
        "examples/gallery/plot_1_structures.py",
        "pyproject.toml",
        "sirfshampoo/py.typed",
        "tests/twin.py",
    ):
        assert name in members, name
    pictures = [name for name in members if name.endswith(".png")]
    assert pictures == ["benchmarks/results/front.png"]
    unwanted = ("benchmarks/gpu/data", "site", "docs/_build", "docs/gallery")
    assert not [name for name in members if name.startswith(unwanted)]
    assert (dist / f"sirf_shampoo-{VERSION}.tar.gz").stat().st_size < 1_200_000


def test_two_distributions_of_one_package_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {"sirfshampoo": "0.0.1", "sirf-shampoo": VERSION}
    monkeypatch.setattr(rival, "version", found.__getitem__)
    with pytest.warns(UserWarning, match="sirfshampoo 0.0.1 and sirf-shampoo") as told:
        rival.warn_of_rival()
    assert "pip uninstall sirfshampoo sirf-shampoo" in str(told[0].message)


@pytest.mark.parametrize("absent", ["sirfshampoo", "sirf-shampoo"])
def test_one_distribution_alone_is_fine(
    absent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == absent:
            raise PackageNotFoundError(name)
        return VERSION

    monkeypatch.setattr(rival, "version", version)
    rival.warn_of_rival()
