"""ARCHITECTURE.md is a map: it has a line for every file, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "ssd_runtime" / "ARCHITECTURE.md").read_text()
NAMES = set(re.findall(r"`([\w./-]+)`", TEXT))
LINES = set(re.findall(r"`([\w./-]+)`", TEXT[TEXT.index("## Files") :]))


def files(package: str) -> list[Path]:
    """Relative to the package; what only makes a folder a package is no file of its own."""
    found = (path for path in (ROOT / package).rglob("*") if path.suffix in {".py", ".cpp", ".inc", ".h", ".cu"})
    return [path.relative_to(ROOT / package) for path in found if path.name != "__init__.py"]


@pytest.mark.parametrize("package", ["ssd_runtime", "launcher", "cuda_ext"])
def test_every_file_has_its_line(package: str) -> None:
    def has_line(path: Path) -> bool:
        return bool({str(path), path.name, *(f"{folder}/" for folder in path.parents)} & LINES)

    assert [str(path) for path in files(package) if not has_line(path)] == []


def test_every_file_that_is_named_is_there() -> None:
    there = [
        path for top in ("ssd_runtime", "launcher", "cuda_ext", "tests", "ops") for path in (ROOT / top).rglob("*")
    ]
    names = [f"/{path.relative_to(ROOT)}" for path in there]
    wanted = [name for name in NAMES if re.search(r"\.(py|cpp|inc|h|md|jsonl)$", name)]
    assert len(wanted) > 150
    assert sorted(name for name in wanted if not any(path.endswith(f"/{name}") for path in names)) == []


def test_every_link_leads_to_a_section() -> None:
    titles = re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
