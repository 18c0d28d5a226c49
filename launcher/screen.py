"""What the user sees of several commands: progress on standard error; cores, findings and numbers. Knows no engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ssd_runtime.comm.control import launcher_messages
from ssd_runtime.host.cores import Role, listed

if TYPE_CHECKING:
    from launcher.findings import Finding

WIDTH_OF_A_FILE = 120


class _Console(Console):
    """Left to itself, rich ends the process in silence where nobody reads its output."""

    def on_broken_pipe(self) -> None:
        raise


def console(*, stderr: bool = False) -> Console:
    """A console that does not fold tables to 80 columns when it writes to a file or pipe."""
    found = _Console(stderr=stderr, highlight=False)
    return found if found.is_terminal else _Console(stderr=stderr, highlight=False, width=WIDTH_OF_A_FILE)


@contextlib.contextmanager
def loading(ready: str = "engine ready") -> Iterator[Callable[[launcher_messages.Progress], None]]:
    """One bar for each rank; without a terminal, a line at the end."""
    begin, out = time.monotonic(), console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    tasks: dict[int, TaskID] = {}
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:

        def show(message: launcher_messages.Progress) -> None:
            if message.rank not in tasks:
                tasks[message.rank] = progress.add_task("", total=1.0)
            description = escape(f"{message.role} {message.phase}")
            progress.update(tasks[message.rank], description=f"{description:<28}", completed=message.fraction)

        yield show
    out.print(f"{ready} after {time.monotonic() - begin:.1f} s", style="dim")


@contextlib.contextmanager
def loading_here() -> Iterator[Callable[[Role, float], None]]:
    """One bar for each role whose model is loaded in this process; the callback takes the role and 0 to 1."""
    with loading("models loaded") as show:
        yield lambda role, fraction: show(
            launcher_messages.Progress(role, 0 if role == "target" else 1, "load", fraction)
        )


@contextlib.contextmanager
def counting(title: str, total: int) -> Iterator[Callable[[str], None]]:
    """A bar over `total` steps; the callback takes what was done last."""
    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, advance=1, description=f"{title} {escape(done):<14}")


@contextlib.contextmanager
def fetching(title: str) -> Iterator[Callable[[float], None]]:
    """A bar from 0 to 1."""
    out = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:
        task = progress.add_task(escape(title), total=1.0)
        yield lambda fraction: progress.update(task, completed=fraction)


def cores_line(cores: Mapping[str, Iterable[int]]) -> str:
    """Which role runs where, as "target on core 0, draft on core 1"."""
    parts = []
    for role, numbers in cores.items():
        pinned = tuple(numbers)
        parts.append(f"{role} on core{'s' if len(pinned) > 1 else ''} {listed(pinned) or '(not pinned)'}")
    return ", ".join(parts)


def findings_table(findings: Iterable[Finding]) -> Table:
    """The doctor's report."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        mark = "[green]OK[/green]" if finding.ok else "[bold red]FAIL[/bold red]"
        table.add_row(mark, finding.subject, escape(finding.detail))
    return table


def number(value: float | None, digits: int, unit: str = "") -> str:
    """A number for people; a dash for one that was not measured."""
    return "-" if value is None else f"{value:.{digits}f}{unit}"


def percent(value: float | None, digits: int = 0) -> str:
    """A fraction as a percentage."""
    return "-" if value is None else f"{value:.{digits}%}"
