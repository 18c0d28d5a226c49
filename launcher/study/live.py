"""The figures that need a running engine: speed over temperature and over batch, by the machinery of `ssd bench`."""

from __future__ import annotations

import math
import statistics
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from msgspec.structs import replace

from launcher.bench.benchmark import Workload, count_steps, measure
from launcher.bench.plan import Run, plan_runs
from launcher.bench.prompts import Prompt
from launcher.bench.report import results_of
from launcher.generation import Generates
from launcher.study.figures import POLICIES, Point
from ssd_runtime.config import SpeculationConfig
from ssd_runtime.speculation.types import SamplingParams

Engines = Callable[[tuple[str, ...]], AbstractContextManager[Generates]]  # starts one with these overrides


def backups() -> tuple[str, ...]:
    """Every backup a configuration may name."""
    found: tuple[str, ...] = typing.get_args(typing.get_type_hints(SpeculationConfig)["backup"])
    return found


@dataclass(frozen=True)
class Setting:
    """One engine of a figure.

    Attributes:
        series: the name of SSD in this engine.
        overrides: what it is started with.
        runs: SD in every engine, in turns with SSD: engines are started one after the other, and machines drift.
    """

    series: str
    overrides: tuple[str, ...]
    runs: Sequence[Run]


@dataclass(frozen=True)
class LiveFigure:
    """A figure to be measured: every workload in every engine."""

    name: str
    engines: Sequence[Setting]
    workloads: Sequence[Workload]

    @property
    def num_steps(self) -> int:
        """How often `measure` calls `advance`."""
        return sum(count_steps(one.runs, workload) for one in self.engines for workload in self.workloads)

    def measure(self, engines: Engines, advance: Callable[[str], None]) -> list[Point]:
        """Its points; what was measured in several engines is one point."""
        found: list[Point] = []
        for setting in self.engines:
            with engines(setting.overrides) as client:
                for workload in self.workloads:
                    found += self._points(setting, client, workload, advance)
        return _joined(found)

    def _points(
        self, setting: Setting, client: Generates, workload: Workload, advance: Callable[[str], None]
    ) -> list[Point]:
        alone, temperature = self.name != "6", workload.params.temperature
        rows = results_of(measure(client, setting.runs, workload, advance), workload.prompts).runs
        speeds = [row.tokens_per_second if alone else row.tokens_per_second_per_sequence for row in rows]
        sd = {row.batch: speed for row, speed in zip(rows, speeds, strict=True) if row.mode == "sd"}
        return [
            Point(
                figure=self.name,
                series=setting.series if row.mode == "ssd" else row.mode,
                temperature=temperature,
                x=temperature if alone else row.batch,
                y=speed,
                rounds=row.rounds,
                note=row.hit_rate,
                over_sd=speed / anchor if row.mode != "sd" and speed and (anchor := sd.get(row.batch)) else None,
            )
            for row, speed in zip(rows, speeds, strict=True)
        ]


def figure4_speed(
    prompts: Sequence[Prompt], temperatures: Sequence[float], max_tokens: int, lookahead: int
) -> LiveFigure:
    """tokens/s over temperature: AR, SD, and SSD under each fan-out policy; note: hit rate, late branches included."""
    engines = [
        Setting(
            f"ssd, {policy}",
            (f"speculation.fan_out={policy}", "speculation.mode=ssd"),
            plan_runs(("sd", "ssd") if engine else ("ar", "sd", "ssd"), (), lookahead),
        )
        for engine, policy in enumerate(POLICIES)
    ]
    params = [SamplingParams(temperature=temperature) for temperature in temperatures]
    return LiveFigure("4 speed", engines, [Workload(tuple(prompts), one, max_tokens) for one in params])


def figure6(prompts: Sequence[Prompt], batches: Sequence[int], max_tokens: int, lookahead: int) -> LiveFigure:
    """tokens/s of one sequence over requests at once, at T = 0: AR, SD, and SSD with each backup; note: hit rate."""
    engines = [
        Setting(
            f"ssd, backup {backup}",
            (f"speculation.backup={backup}", "speculation.mode=ssd", f"engine.max_num_seqs={max(batches)}"),
            plan_runs(("sd", "ssd") if engine else ("ar", "sd", "ssd"), (), lookahead, batches),
        )
        for engine, backup in enumerate(backups())
    ]
    return LiveFigure("6", engines, [Workload(tuple(prompts), SamplingParams(), max_tokens, ignore_eos=True)])


def _joined(points: Sequence[Point]) -> list[Point]:
    """What was measured in several engines as one point: the mean, and its standard error over the engines."""
    alike: dict[tuple[str, float, float], list[Point]] = {}
    for point in points:
        alike.setdefault((point.series, point.temperature, point.x), []).append(point)
    found = []
    for some in alike.values():
        first, speeds = some[0], [point.y for point in some if point.y is not None]
        if len(speeds) > 1:
            error = statistics.stdev(speeds) / math.sqrt(len(speeds))
            rounds = sum(point.rounds or 0.0 for point in some)
            first = replace(first, y=statistics.fmean(speeds), error=error, rounds=rounds)
        found.append(first)
    return found
