"""The figures that need a running engine: speed over temperature and over batch, by the machinery of `ssd bench`."""

from __future__ import annotations

import math
import statistics
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from launcher.bench.benchmark import Workload, measure
from launcher.bench.plan import Run, plan_runs
from launcher.bench.prompts import Prompt
from launcher.bench.report import Row, results_of
from launcher.generation import Generates
from launcher.study.figures import POLICIES, Point
from ssd_runtime.config import SpeculationConfig
from ssd_runtime.speculation.types import SamplingParams

Engines = Callable[[tuple[str, ...]], AbstractContextManager[Generates]]
Advance = Callable[[str], None]
SPEED = {"4 speed": "tokens_per_second", "6": "tokens_per_second_per_sequence"}  # names of launcher/bench/report.py


def backups() -> tuple[str, ...]:
    """Every backup a configuration may name."""
    found: tuple[str, ...] = typing.get_args(typing.get_type_hints(SpeculationConfig)["backup"])
    return found


def figure4_speed(
    engines: Engines,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    max_tokens: int,
    lookahead: int,
    advance: Advance,
) -> list[Point]:
    """tokens/s over temperature: AR, SD, and SSD under each fan-out policy; note: hit rate, late branches included.

    Args:
        engines: starts an engine with these overrides.
    """
    found: list[Point] = []
    for policy in POLICIES:
        runs = plan_runs(_modes(policy == POLICIES[0]), (), lookahead)
        with engines((f"speculation.fan_out={policy}", "speculation.mode=ssd")) as client:
            for temperature in temperatures:
                workload = Workload(tuple(prompts), SamplingParams(temperature=temperature), max_tokens)
                rows = _rows(client, runs, workload, advance)
                found += _points("4 speed", f"ssd, {policy}", temperature, [(temperature, row) for row in rows])
    return _joined(found)


def figure4_steps(num_prompts: int, num_temperatures: int) -> int:
    """How often `figure4_speed` calls `advance`."""
    return (2 * len(POLICIES) + 1) * num_temperatures * (1 + num_prompts)


def figure6_steps(num_prompts: int, batches: Sequence[int]) -> int:
    """How often `figure6` calls `advance`."""
    return sum((2 * len(backups()) + 1) * (1 + -(-num_prompts // batch)) for batch in batches)


def figure6(
    engines: Engines,
    prompts: Sequence[Prompt],
    batches: Sequence[int],
    max_tokens: int,
    lookahead: int,
    advance: Advance,
) -> list[Point]:
    """tokens/s of one sequence over requests at once, at T = 0: AR, SD, and SSD with each backup; note: hit rate."""
    found: list[Point] = []
    for backup in backups():
        runs = plan_runs(_modes(backup == backups()[0]), (), lookahead, batches)
        overrides = (f"speculation.backup={backup}", "speculation.mode=ssd", f"engine.max_num_seqs={max(batches)}")
        with engines(overrides) as client:
            workload = Workload(tuple(prompts), SamplingParams(), max_tokens, ignore_eos=True)
            rows = _rows(client, runs, workload, advance)
            found += _points("6", f"ssd, backup {backup}", 0.0, [(row.batch, row) for row in rows])
    return _joined(found)


def _rows(client: Generates, runs: Sequence[Run], workload: Workload, advance: Advance) -> Sequence[Row]:
    return results_of(measure(client, runs, workload, advance), workload.prompts).runs


def _modes(first: bool) -> tuple[str, ...]:
    """SD runs in every engine, in turns with SSD: engines are started one after the other, and machines drift."""
    return ("ar", "sd", "ssd") if first else ("sd", "ssd")


def _points(figure: str, ssd: str, temperature: float, rows: Sequence[tuple[float, Row]]) -> list[Point]:
    """Of one engine: (x, row of the benchmark) of each run; `ssd` is the name of SSD in this engine."""
    anchors = {x: getattr(row, SPEED[figure]) for x, row in rows if row.mode == "sd"}
    found = []
    for x, row in rows:
        name = ssd if row.mode == "ssd" else row.mode
        speed, anchor = getattr(row, SPEED[figure]), anchors.get(x) if row.mode != "sd" else None
        over_sd = speed / anchor if speed and anchor else None
        found.append(Point(figure, name, temperature, x, speed, None, row.rounds, row.hit_rate, over_sd))
    return found


def _joined(points: Sequence[Point]) -> list[Point]:
    """What was measured in several engines as one point: the mean, and its standard error over the engines."""
    alike: dict[tuple[str, float, float], list[Point]] = {}
    for point in points:
        alike.setdefault((point.series, point.temperature, point.x), []).append(point)
    found = []
    for first, *others in alike.values():
        speeds = [point.y for point in (first, *others) if point.y is not None]
        if len(speeds) > 1:
            error = statistics.stdev(speeds) / math.sqrt(len(speeds))
            rounds = sum(point.rounds or 0.0 for point in (first, *others))
            first = replace(first, y=statistics.fmean(speeds), error=error, rounds=rounds)
        found.append(first)
    return found
