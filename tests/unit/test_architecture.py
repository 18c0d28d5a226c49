"""The documents are a map: every file has its line, what is named is there, and every link leads somewhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ssd_runtime.config import Config

ROOT = Path(__file__).parents[2]
MAP = ROOT / "ssd_runtime" / "ARCHITECTURE.md"
OPERATORS = ROOT / "cuda_ext" / "README.md"
PLACES = ("*.md", "ssd_runtime/**/*.md", "launcher/*.md", "cuda_ext/*.md", "ops/**/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))


def names(text: str) -> set[str]:
    """What stands in backticks and may be a path."""
    return set(re.findall(r"`([\w./-]+)`", text))


def lines(document: Path) -> set[str]:
    """The names in a document's section on files."""
    text = document.read_text()
    return names(text[text.index("## Files") :])


def files(package: str) -> list[Path]:
    """Relative to the package; what only makes a folder a package is no file of its own."""
    sources = {".py", ".cpp", ".inc", ".h", ".cu", ".cuh"}
    found = (path for path in (ROOT / package).rglob("*") if path.suffix in sources)
    return [path.relative_to(ROOT / package) for path in found if path.name != "__init__.py"]


@pytest.mark.parametrize(
    ("package", "document"), [("ssd_runtime", MAP), ("launcher", MAP), ("cuda_ext", MAP), ("cuda_ext", OPERATORS)]
)
def test_every_file_has_its_line(package: str, document: Path) -> None:
    known = lines(document)

    def has_line(path: Path) -> bool:
        return bool({str(path), path.name, *(f"{folder}/" for folder in path.parents)} & known)

    assert [str(path) for path in files(package) if not has_line(path)] == []


@pytest.mark.parametrize("document", [MAP, OPERATORS], ids=lambda path: path.parent.name)
def test_every_file_that_is_named_is_there(document: Path) -> None:
    there = [
        path for top in ("ssd_runtime", "launcher", "cuda_ext", "tests", "ops") for path in (ROOT / top).rglob("*")
    ]
    paths = [f"/{path.relative_to(ROOT)}" for path in there]
    wanted = [name for name in names(document.read_text()) if re.search(r"\.(py|cpp|inc|h|cuh?|md|jsonl)$", name)]
    assert len(wanted) > 25
    assert sorted(name for name in wanted if not any(path.endswith(f"/{name}") for path in paths)) == []


def anchors(document: Path) -> set[str]:
    """What GitHub makes of its headings."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_section(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", document.read_text())
    for path, anchor in links:
        there = (document.parent / path).resolve() if path else document
        assert there.exists(), path
        assert not anchor or anchor in anchors(there), f"{path}#{anchor}"


def test_every_key_of_the_configuration_has_its_row() -> None:
    sections = tomllib.loads(Config().to_toml())
    keys = {f"{section}.{key}" for section, values in sections.items() for key in values if section != "draft"}
    rows = re.findall(r"^\| `(\w+\.\w+)` \|", (ROOT / "launcher" / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(keys)
