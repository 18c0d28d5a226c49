"""What `ssd bench` prints of its report: tables, a verdict on the tokens, cores. Knows no engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from launcher.bench.report import Report, Results, Row, Setup
from launcher.screen import console, cores_line, number, percent
from ssd_runtime.config import SpeculationConfig

Cell = Callable[[Row], str]


def show(report: Report) -> None:
    """Print the report: tables, comparison of the tokens, cores."""
    out = console()
    if report.label is not None:
        out.print(report.label, markup=False, soft_wrap=True)
    out.print(runs_table(report))
    out.print(serving_table(report))
    out.print(verdict(report), markup=False)
    if report.invariant_over_fast is not None:
        out.print(cost_line(report.invariant_over_fast), markup=False)
    if not report.setups:
        out.print(cores_line(report.machine.cores), markup=False)
        return
    about = setup_lines(report.setups, bool(report.budget_divided), report.workload.config.speculation)
    for line in (*series_lines(report), *about):
        out.print(line, markup=False, soft_wrap=True)


def runs_table(results: Results) -> Table:
    """The runs of a benchmark, one a row; the best lookahead of each mode is marked."""
    several = any("@" in row.name for row in results.runs)
    setups = any(row.drafts is not None for row in results.runs)

    def name(row: Row) -> str:
        numerics = " invariant" if row.numerics == "invariant" else ""
        return (row.name if setups else row.mode) + numerics + (" *" if _marked(row) else "")

    columns: dict[str, Cell] = {"mode": name}
    if setups:
        columns["drafts x B"] = _setup
    if any(row.batch > 1 for row in results.runs):
        columns["batch"] = lambda row: str(row.batch)
    columns |= {
        "K": lambda row: str(row.lookahead or "-"),
        "tokens/s": lambda row: number(row.tokens_per_second, 1),
        "vs AR": lambda row: number(row.speedup, 2, "x"),
        "tokens/round": lambda row: number(row.tokens_per_round, 2),
        "hit rate": lambda row: percent(row.hit_rate),
        "acceptance": lambda row: percent(row.acceptance),
        "round ms": lambda row: number(row.round_ms.p50, 1),
        "verify ms": lambda row: number(row.verify_ms.p50, 1),
        "prefill s": lambda row: number(row.prefill_seconds, 1),
    }
    return _table(columns, results.runs, "* the best lookahead of its mode" if several else None)


def serving_table(results: Results) -> Table:
    """What a user and an owner of the machine see of the same runs."""
    columns: dict[str, Cell] = {
        "run": lambda row: row.name,
        "tokens/s": lambda row: number(row.tokens_per_second, 1),
        "a sequence": lambda row: number(row.tokens_per_second_per_sequence, 1),
        "a device": lambda row: number(row.tokens_per_second_per_device, 1),
        "TTFT ms p50": lambda row: number(row.ttft_ms.p50, 0),
        "TTFT p95": lambda row: number(row.ttft_ms.p95, 0),
        "TPOT ms p50": lambda row: number(row.tpot_ms.p50, 1),
        "TPOT p95": lambda row: number(row.tpot_ms.p95, 1),
    }
    caption = "TTFT with waiting and prefill; TPOT = (end to end - TTFT) / (tokens - 1)"
    return _table(columns, results.runs, caption)


def _table(columns: Mapping[str, Cell], rows: Sequence[Row], caption: str | None) -> Table:
    table = Table(caption=caption)
    for place, head in enumerate(columns):
        table.add_column(head, justify="right" if place else "left", no_wrap=place == 0 or head == "drafts x B")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()), style="bold" if _marked(row) else None)
    return table


def _marked(row: Row) -> bool:
    return row.best and "@" in row.name


def verdict(results: Results) -> str:
    """Whether all runs gave the same tokens, and else where they part."""
    where = results.first_divergence
    if where is None:
        if not results.compared_outputs:
            return "one run only: nothing to compare its tokens with"
        return f"tokens: identical in all runs ({results.compared_outputs} outputs compared)"
    close = "" if where.logit_gap is None else f", {where.logit_gap:+.4f} logits apart"
    return (
        f"tokens: {results.differing_outputs} of {results.compared_outputs} outputs differ; the first: "
        f"{where.prompt} at token {where.position}, {where.tokens[0]} in {where.runs[0]} against "
        f"{where.tokens[1]} in {where.runs[1]}{close}\n"
        "(in plain torch, rounding may turn a near-tie in bf16 and int8, unless engine.numerics is invariant; with the "
        "compiled operators this is a bug)"
    )


def cost_line(costs: Mapping[str, float | None]) -> str:
    """What invariant numerics cost, run by run."""
    each = ", ".join(f"{name} {number(cost, 2)}" for name, cost in costs.items())
    return f"invariant numerics, tokens/s of fast: {each}"


def setup_lines(setups: Sequence[Setup], divided: bool, speculation: SpeculationConfig) -> list[str]:
    """Which budgets were compared, and on which cores; where ranks shared some the comparison is not fair."""
    how = "divided among the drafts" if divided else "the same for each draft"
    most = "; these are the most, speculation.adapt plans each round" if speculation.adapt else ""
    lines = [f"budgets {how}: {', '.join(map(_setup, setups))}{most}"]
    if divided and len({setup.drafts * setup.budget for setup in setups}) > 1:
        drafts, asked = [setup.drafts for setup in setups], speculation.budget
        whole = math.lcm(*drafts)
        fitting = whole * max(1, round(asked / whole))
        listed = ", ".join(map(str, drafts))
        lines.append(
            f"these are not equal in all: {asked} cannot be divided by {listed}; speculation.budget={fitting} can"
        )
    lines += [f"d{setup.drafts}: {cores_line(setup.cores)}" for setup in setups]
    if crowded := ", ".join(f"d{setup.drafts}" for setup in setups if setup.shares_cores):
        lines.append(f"ranks of {crowded} share cores: their drafts hit less often than on cores of their own")
    return lines


def series_lines(results: Results) -> list[str]:
    """Hit rate and speed over the number of drafts, a line of each for each lookahead and batch of mode ssd."""
    series: dict[str, list[str]] = {}
    for row in results.runs:
        if row.mode == "ssd" and row.drafts is not None:
            name = row.name.replace(f" d{row.drafts}", "")
            drafts = f"with {row.drafts} draft{'s' if row.drafts > 1 else ''}"
            series.setdefault(f"hit rate of {name}", []).append(f"{percent(row.hit_rate, 1)} {drafts}")
            series.setdefault(f"tokens/s of {name}", []).append(f"{number(row.tokens_per_second, 1)} {drafts}")
    return [f"{what}: {', '.join(values)}" for what, values in series.items()]


def _setup(one: Setup | Row) -> str:
    """The drafts of an engine, the budget of each and of all, as "2 x 8 = 16"; a dash for a run without drafts."""
    if one.drafts is None or one.budget is None:
        return "-"
    return f"{one.drafts} x {one.budget} = {one.drafts * one.budget}"
