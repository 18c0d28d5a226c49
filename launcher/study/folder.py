"""A study on disk: the points of its figures, and how each was measured. It grows by runs with the same pair and sizes.

`study.json` says what is studied and how, `figure*.csv` hold the points; remarks written by hand stand in REMARKS.md.
Knows no models and draws nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec import Struct

from launcher.study.figures import Point
from ssd_runtime.errors import ConfigError

ABOUT, PAGE, REMARKS = "study.json", "README.md", "REMARKS.md"
ORDER = ("3", "4", "4 speed", "5", "6")


class Subject(Struct, frozen=True):
    """What is studied: one pair of models (name and dtype of each) at one K and one B."""

    target: str
    draft: str
    lookahead: int
    budget: int

    @property
    def sizes(self) -> str:
        return f"K = {self.lookahead}, B = {self.budget}"


class Run(Struct, frozen=True):
    """How a figure was measured."""

    command: str
    machine: str
    date: str
    num_prompts: int
    max_tokens: int


class About(Struct, frozen=True, tag_field="format", tag=1):
    """`study.json`: the subject, and the run of each figure."""

    subject: Subject
    figures: dict[str, Run]


@dataclass(frozen=True)
class Figure:
    """The points of a figure, and the run that found them."""

    run: Run
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Folder:
    """One study.

    Attributes:
        figures: in the order of the page.
        remarks: what somebody wrote by hand; "" for nothing.
    """

    path: Path
    subject: Subject
    figures: Mapping[str, Figure]
    remarks: str = ""

    def grown(self, subject: Subject, figures: Mapping[str, Figure]) -> Folder:
        """With more figures; one that is there already is replaced.

        Raises:
            ConfigError: they are of another pair or of other sizes; names what differs.
        """
        for name in Subject.__struct_fields__:
            here, there = getattr(self.subject, name), getattr(subject, name)
            if here != there:
                remedy = "give --out another directory"
                raise ConfigError(f"{self.path} holds a study with {name} = {here}, not {there}; {remedy}")
        both = {**self.figures, **figures}
        return dataclasses.replace(self, figures={name: both[name] for name in ORDER if name in both})

    def save(self, names: Sequence[str]) -> None:
        """Write the points of these figures, and how all were measured."""
        for name in names:
            with (self.path / f"{stem(name)}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, Point.__struct_fields__)
                writer.writeheader()
                writer.writerows(map(msgspec.structs.asdict, self.figures[name].points))
        about = About(self.subject, {name: figure.run for name, figure in self.figures.items()})
        (self.path / ABOUT).write_text(json.dumps(msgspec.to_builtins(about), indent=1) + "\n")


def stem(figure: str) -> str:
    """Of the names of a figure's files."""
    return f"figure{figure.replace(' ', '-')}"


def start(path: Path, subject: Subject) -> Folder:
    """A study without figures; remarks may be there already."""
    return Folder(path, subject, {}, _remarks(path))


def load(path: Path) -> Folder | None:
    """The study in a directory; None if it has no figures.

    Raises:
        ConfigError: a file is damaged, or nothing says how a figure was measured.
    """
    files = {name: path / f"{stem(name)}.csv" for name in ORDER if (path / f"{stem(name)}.csv").is_file()}
    if not files:
        return None
    try:
        about = msgspec.json.decode((path / ABOUT).read_bytes(), type=About)
    except (OSError, ValueError) as error:
        reason = f"{path / ABOUT}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(f"cannot tell what was measured in {path} ({reason}); give another directory") from None
    for name, file in files.items():
        if name not in about.figures:
            remedy = "remove it, or take it with --merge from the directory it was written into"
            raise ConfigError(f"nothing says how {file} was measured; {remedy}")
    figures = {name: Figure(about.figures[name], _points(file)) for name, file in files.items()}
    return Folder(path, about.subject, figures, _remarks(path))


def _points(file: Path) -> tuple[Point, ...]:
    """Columns that are missing, as in files written before they were thought of, are None."""
    try:
        with file.open(newline="") as lines:
            rows = [{key: text or None for key, text in row.items()} for row in csv.DictReader(lines)]
        points = msgspec.convert(rows, tuple[Point, ...], strict=False)
        if not points:
            raise ValueError("it is empty")
    except (OSError, ValueError, csv.Error) as error:
        raise ConfigError(f"cannot read the points of {file}: {error}; remove it to measure anew") from None
    return points


def _remarks(path: Path) -> str:
    file = path / REMARKS
    try:
        return file.read_text().strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
