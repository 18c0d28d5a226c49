"""The figures that need a running engine: speed over temperature and over batch, by the machinery of `ssd bench`."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from launcher import bench
from launcher.prompts import Prompt
from launcher.study.figures import POLICIES, Point
from ssd_runtime.config import SpeculationConfig
from ssd_runtime.speculation.types import SamplingParams

Engines = Callable[[tuple[str, ...]], AbstractContextManager[bench.Generates]]
Advance = Callable[[str], None]


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
) -> Iterator[Point]:
    """tokens/s over temperature: AR, SD, and SSD under each fan-out policy; note: hit rate, late branches included.

    Args:
        engines: starts an engine with these overrides.
    """
    for policy in POLICIES:
        modes = ("ar", "sd", "ssd") if policy == POLICIES[0] else ("ssd",)
        runs = bench.plan_runs(modes, (), lookahead)
        with engines((f"speculation.fan_out={policy}", "speculation.mode=ssd")) as client:
            for temperature in temperatures:
                workload = bench.Workload(tuple(prompts), SamplingParams(temperature=temperature), max_tokens)
                for row in _rows(client, runs, workload, advance):
                    name = f"ssd, {policy}" if row["mode"] == "ssd" else row["mode"]
                    yield _point("4 speed", name, temperature, temperature, row, row["tokens_per_second"])


def figure4_steps(num_prompts: int, num_temperatures: int) -> int:
    """How often `figure4_speed` calls `advance`."""
    return (len(POLICIES) + 2) * num_temperatures * (1 + num_prompts)


def figure6_steps(num_prompts: int, batches: Sequence[int]) -> int:
    """How often `figure6` calls `advance`."""
    return sum((len(backups()) + 2) * (1 + -(-num_prompts // batch)) for batch in batches)


def figure6(
    engines: Engines,
    prompts: Sequence[Prompt],
    batches: Sequence[int],
    max_tokens: int,
    lookahead: int,
    advance: Advance,
) -> Iterator[Point]:
    """tokens/s of one sequence over requests at once, at T = 0: AR, SD, and SSD with each backup; note: hit rate."""
    for backup in backups():
        modes = ("ar", "sd", "ssd") if backup == backups()[0] else ("ssd",)
        runs = bench.plan_runs(modes, (), lookahead, batches)
        overrides = (f"speculation.backup={backup}", "speculation.mode=ssd", f"engine.max_num_seqs={max(batches)}")
        with engines(overrides) as client:
            workload = bench.Workload(tuple(prompts), SamplingParams(), max_tokens, ignore_eos=True)
            for row in _rows(client, runs, workload, advance):
                name = f"ssd, backup {backup}" if row["mode"] == "ssd" else row["mode"]
                yield _point("6", name, 0.0, row["batch"], row, row["tokens_per_second_per_sequence"])


def _rows(
    client: bench.Generates, runs: Sequence[bench.Run], workload: bench.Workload, advance: Advance
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = bench.report_on(bench.measure(client, runs, workload, advance), workload.prompts)[
        "runs"
    ]
    return rows


def _point(
    figure: str, series: str, temperature: float, x: float, row: Mapping[str, Any], speed: float | None
) -> Point:
    return Point(figure, series, temperature, x, speed, None, row["rounds"], row["hit_rate"])
