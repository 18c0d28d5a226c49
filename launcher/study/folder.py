"""A study on disk: the points of its figures, and how each was measured. It grows by runs with the same pair and sizes.

`study.json` says what is studied and how, `figure*.csv` hold the points; remarks written by hand stand in REMARKS.md.
Knows no models and draws nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.study.figures import Point, as_rows
from ssd_runtime.errors import ConfigError

FORMAT = 1
ABOUT, PAGE, REMARKS = "study.json", "README.md", "REMARKS.md"
ORDER = ("3", "4", "4 speed", "5", "6")
TEXTS = ("figure", "series")  # columns of a CSV file that are not numbers


@dataclass(frozen=True)
class Subject:
    """What is studied: one pair of models (name and dtype of each) at one K and one B."""

    target: str
    draft: str
    lookahead: int
    budget: int

    @property
    def sizes(self) -> str:
        return f"K = {self.lookahead}, B = {self.budget}"


@dataclass(frozen=True)
class Run:
    """How a figure was measured."""

    command: str
    machine: str
    date: str
    num_prompts: int
    max_tokens: int


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
        for spec in dataclasses.fields(Subject):
            here, there = getattr(self.subject, spec.name), getattr(subject, spec.name)
            if here != there:
                remedy = "give --out another directory"
                raise ConfigError(f"{self.path} holds a study with {spec.name} = {here}, not {there}; {remedy}")
        both = {**self.figures, **figures}
        return dataclasses.replace(self, figures={name: both[name] for name in ORDER if name in both})

    def save(self, names: Sequence[str]) -> None:
        """Write the points of these figures, and how all were measured."""
        for name in names:
            with (self.path / f"{stem(name)}.csv").open("w", newline="") as file:
                rows = as_rows(self.figures[name].points)
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        about = {
            "format": FORMAT,
            "subject": dataclasses.asdict(self.subject),
            "figures": {name: dataclasses.asdict(figure.run) for name, figure in self.figures.items()},
        }
        (self.path / ABOUT).write_text(json.dumps(about, indent=1) + "\n")


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
    about = path / ABOUT
    try:
        known = json.loads(about.read_text()) if about.is_file() else from_page((path / PAGE).read_text(), list(files))
        if known["format"] != FORMAT:
            raise ValueError(f"format {known['format']}, not {FORMAT}")
        subject = Subject(**known["subject"])
        runs = {name: Run(**run) for name, run in known["figures"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{about if about.is_file() else path / PAGE}: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(f"cannot tell what was measured in {path} ({reason}); give another directory") from None
    for name, file in files.items():
        if name not in runs:
            remedy = "remove it, or take it with --merge from the directory it was written into"
            raise ConfigError(f"nothing says how {file} was measured; {remedy}")
    return Folder(path, subject, {name: Figure(runs[name], _points(files[name])) for name in files}, _remarks(path))


def from_page(page: str, figures: Sequence[str]) -> dict[str, Any]:
    """What `study.json` would say, from the head of a page that was written before there was such a file.

    Raises:
        ValueError: it has no such head.
    """
    facts = dict(re.findall(r"^- (target, draft|sizes|machine|date): (.+)$", page, re.MULTILINE))
    sizes = re.fullmatch(r"K = (\d+), B = (\d+), (\d+) prompts, up to (\d+) tokens each", facts.get("sizes", ""))
    command = re.search(r"^    (ssd .+)$", page, re.MULTILINE)
    target, comma, draft = facts.get("target, draft", "").partition(", ")
    if sizes is None or command is None or not comma or not {"machine", "date"} <= set(facts):
        raise ValueError("it does not begin as the page of a study does")
    lookahead, budget, num_prompts, max_tokens = map(int, sizes.groups())
    run = Run(command[1], facts["machine"], facts["date"], num_prompts, max_tokens)
    return {
        "format": FORMAT,
        "subject": dataclasses.asdict(Subject(target, draft, lookahead, budget)),
        "figures": {name: dataclasses.asdict(run) for name in figures},
    }


def _points(file: Path) -> tuple[Point, ...]:
    """Columns that are missing, as in files written before they were thought of, are None."""
    try:
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        points = tuple(Point(**{key: _value(key, text) for key, text in row.items()}) for row in rows)
        if not points:
            raise ValueError("it is empty")
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise ConfigError(f"cannot read the points of {file}: {error}; remove it to measure anew") from None
    return points


def _value(key: str, text: str) -> Any:
    return text if key in TEXTS else float(text) if text else None


def _remarks(path: Path) -> str:
    file = path / REMARKS
    try:
        return file.read_text().strip() if file.is_file() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
