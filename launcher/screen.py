"""What the user sees: progress on standard error, tables on standard output. Knows no engine."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ssd_runtime.comm.control import launcher_messages as messages_launcher
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
def loading(ready: str = "engine ready") -> Iterator[Callable[[messages_launcher.Progress], None]]:
    """One bar for each rank; without a terminal, a line at the end."""
    begin, out = time.monotonic(), console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    tasks: dict[int, TaskID] = {}
    with Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as progress:

        def show(message: messages_launcher.Progress) -> None:
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
            messages_launcher.Progress(role, 0 if role == "target" else 1, "load", fraction)
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


def show_bench(report: dict[str, Any]) -> None:
    """Print the report of a benchmark: tables, comparison of the tokens, cores."""
    out = console()
    if "label" in report:
        out.print(report["label"], markup=False, soft_wrap=True)
    out.print(bench_table(report))
    out.print(serving_table(report))
    out.print(bench_verdict(report), markup=False)
    if "invariant_over_fast" in report:
        out.print(cost_lines(report["invariant_over_fast"]), markup=False)
    if "setups" not in report:
        out.print(cores_line(report["machine"]["cores"]), markup=False)
        return
    for line in (*series_lines(report), *setup_lines(report)):
        out.print(line, markup=False, soft_wrap=True)


def bench_table(report: dict[str, Any]) -> Table:
    """The runs of a benchmark, one a row; the best lookahead of each mode is marked."""
    several = any("@" in row["name"] for row in report["runs"])
    table = Table(caption="* the best lookahead of its mode" if several else None)
    table.add_column("mode", no_wrap=True)
    if "setups" in report:
        table.add_column("drafts x B", justify="right", no_wrap=True)
    heads = ("K", "tokens/s", "vs AR", "tokens/round", "hit rate", "acceptance", "round ms", "verify ms", "prefill s")
    for name in ("batch", *heads) if _batched(report) else heads:
        table.add_column(name, justify="right")
    for row in report["runs"]:
        marked = row["best"] and "@" in row["name"]
        table.add_row(
            (row["name"] if "setups" in report else row["mode"])
            + (" invariant" if row.get("numerics") == "invariant" else "")
            + (" *" if marked else ""),
            *([setup_text(row) if "drafts" in row else "-"] if "setups" in report else []),
            *([str(row["batch"])] if _batched(report) else []),
            str(row["lookahead"] or "-"),
            number(row["tokens_per_second"], 1),
            number(row["speedup"], 2, "x"),
            number(row["tokens_per_round"], 2),
            percent(row["hit_rate"]),
            percent(row["acceptance"]),
            number(row["round_ms"]["p50"], 1),
            number(row["verify_ms"]["p50"], 1),
            number(row["prefill_seconds"], 1),
            style="bold" if marked else None,
        )
    return table


def serving_table(report: dict[str, Any]) -> Table:
    """What a user and an owner of the machine see of the same runs."""
    table = Table(caption="TTFT with waiting and prefill; TPOT = (end to end - TTFT) / (tokens - 1)")
    table.add_column("run")
    for name in ("tokens/s", "a sequence", "a device", "TTFT ms p50", "p95", "TPOT ms p50", "p95"):
        table.add_column(name, justify="right")
    for row in report["runs"]:
        table.add_row(
            row["name"],
            number(row["tokens_per_second"], 1),
            number(row["tokens_per_second_per_sequence"], 1),
            number(row["tokens_per_second_per_device"], 1),
            number(row["ttft_ms"]["p50"], 0),
            number(row["ttft_ms"]["p95"], 0),
            number(row["tpot_ms"]["p50"], 1),
            number(row["tpot_ms"]["p95"], 1),
        )
    return table


def _batched(report: dict[str, Any]) -> bool:
    return any(row["batch"] > 1 for row in report["runs"])


def bench_verdict(report: dict[str, Any]) -> str:
    """Whether all runs gave the same tokens, and else where they part."""
    if report["identical_tokens"]:
        if not report["compared_outputs"]:
            return "one run only: nothing to compare its tokens with"
        return f"tokens: identical in all runs ({report['compared_outputs']} outputs compared)"
    where = report["first_divergence"]
    gap = where.get("logit_gap")
    close = "" if gap is None else f", {gap:+.4f} logits apart"
    return (
        f"tokens: {report['differing_outputs']} of {report['compared_outputs']} outputs differ; the first: "
        f"{where['prompt']} at token {where['position']}, {where['tokens'][0]} in {where['runs'][0]} against "
        f"{where['tokens'][1]} in {where['runs'][1]}{close}\n"
        "(in plain torch, rounding may turn a near-tie in bf16 and int8, unless engine.numerics is invariant; with the "
        "compiled operators this is a bug)"
    )


def cost_lines(costs: Mapping[str, float | None]) -> str:
    """What invariant numerics cost, run by run."""
    each = ", ".join(f"{name} {number(cost, 2)}" for name, cost in costs.items())
    return f"invariant numerics, tokens/s of fast: {each}"


def setup_text(setup: Mapping[str, Any]) -> str:
    """The drafts of an engine, the budget of each and of all, as "2 x 8 = 16"."""
    return f"{setup['drafts']} x {setup['budget']} = {setup['drafts'] * setup['budget']}"


def setup_lines(report: Mapping[str, Any]) -> list[str]:
    """Which budgets were compared, and on which cores; where ranks shared some the comparison is not fair."""
    how = "divided among the drafts" if report["budget_divided"] else "the same for each draft"
    planned = report["workload"]["config"]["speculation"]["adapt"]
    most = "; these are the most, speculation.adapt plans each round" if planned else ""
    lines = [f"budgets {how}: {', '.join(map(setup_text, report['setups']))}{most}"]
    if report["budget_divided"] and len({setup["drafts"] * setup["budget"] for setup in report["setups"]}) > 1:
        drafts = [setup["drafts"] for setup in report["setups"]]
        asked = report["workload"]["config"]["speculation"]["budget"]
        listed, whole = ", ".join(map(str, drafts)), math.lcm(*drafts)
        fitting = whole * max(1, round(asked / whole))
        lines.append(
            f"these are not equal in all: {asked} cannot be divided by {listed}; speculation.budget={fitting} can"
        )
    lines += [f"d{setup['drafts']}: {cores_line(setup['cores'])}" for setup in report["setups"]]
    if crowded := ", ".join(f"d{setup['drafts']}" for setup in report["setups"] if setup["shares_cores"]):
        lines.append(f"ranks of {crowded} share cores: their drafts hit less often than on cores of their own")
    return lines


def series_lines(report: Mapping[str, Any]) -> list[str]:
    """Hit rate and speed over the number of drafts, a line of each for each lookahead and batch of mode ssd."""
    series: dict[str, list[str]] = {}
    for row in report["runs"]:
        if row["mode"] == "ssd" and "drafts" in row:
            name = row["name"].replace(f" d{row['drafts']}", "")
            drafts = f"with {row['drafts']} draft{'s' if row['drafts'] > 1 else ''}"
            rate = "-" if row["hit_rate"] is None else f"{100 * row['hit_rate']:.1f}%"
            series.setdefault(f"hit rate of {name}", []).append(f"{rate} {drafts}")
            series.setdefault(f"tokens/s of {name}", []).append(f"{number(row['tokens_per_second'], 1)} {drafts}")
    return [f"{what}: {', '.join(values)}" for what, values in series.items()]


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


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    return "-" if value is None else f"{100 * value:.0f}%"
