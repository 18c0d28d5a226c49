"""The report of `ssd bench`, as it is written and read back: a row for each run, what their tokens say, where they ran.

Knows no engine and no terminal.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping, Sequence

from msgspec import Struct
from msgspec.structs import asdict, replace

from launcher.bench.benchmark import Batch, Measured
from launcher.bench.divergence import Divergence, divergences
from launcher.bench.prompts import Prompt
from launcher.summary import Summary, summarise
from ssd_runtime.config import Config, Mode, Numerics
from ssd_runtime.metrics import ratio
from ssd_runtime.speculation.types import SamplingParams


class Row(Summary, frozen=True, kw_only=True, omit_defaults=True):
    """One run. Speeds and seconds are of the engine as a whole where requests ran at once.

    Attributes:
        name, mode, lookahead, batch: of the run.
        drafts, budget: of its engine, where setups of drafts are compared.
        numerics: of its engine, where these are compared.
        best: whether it is the fastest of its mode, drafts and batch.
        speedup: over AR at the same batch.
        devices: cores or GPUs that it used.
    """

    name: str
    mode: Mode
    lookahead: int
    batch: int
    drafts: int | None = None
    budget: int | None = None
    numerics: Numerics | None = None
    tokens_per_second_per_sequence: float | None
    tokens_per_second_per_device: float | None
    tokens_per_second_by_repeat: tuple[float | None, ...]
    devices: int
    best: bool
    speedup: float | None


class Results(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What runs of one workload came to.

    Attributes:
        label: what must be said beside them (model/random/models.py); None of real models.
        identical_tokens_by_numerics, invariant_over_fast: where both numerics ran; the latter in tokens/s, by run.
    """

    label: str | None = None
    runs: tuple[Row, ...]
    identical_tokens: bool
    first_divergence: Divergence | None
    differing_outputs: int
    compared_outputs: int
    identical_tokens_by_numerics: dict[str, bool] | None = None
    invariant_over_fast: dict[str, float | None] | None = None


class Machine(Struct, frozen=True):
    """Where an engine ran; `cores` of each rank."""

    host: str
    hardware: tuple[str, ...]
    system: str
    python: str
    torch: str
    operators: str
    date: str
    cores: dict[str, tuple[int, ...]]


class Setup(Struct, frozen=True):
    """The drafts of one engine, the budget of each, and the cores of its ranks, of which two may share one."""

    drafts: int
    budget: int
    cores: dict[str, tuple[int, ...]]
    shares_cores: bool


class Task(Struct, frozen=True):
    """What was asked for. `config` is what all engines have in common, or that of the last."""

    prompts: str
    num_prompts: int
    max_tokens: int
    repeat: int
    sampling: SamplingParams
    config: Config


class Report(Results, frozen=True, kw_only=True, omit_defaults=True):
    """Results, and how they were measured.

    Attributes:
        setups, budget_divided: where setups of drafts were compared.
    """

    machine: Machine
    setups: tuple[Setup, ...] = ()
    budget_divided: bool | None = None
    workload: Task


def results_of(measured: Sequence[Measured], prompts: Sequence[Prompt]) -> Results:
    """Runs of one workload, compared with the first of them."""
    outputs = {one.run.name: [each for batch in one.batches for each in batch.generations] for one in measured}
    differing = divergences(outputs, prompts)
    return Results(
        runs=ranked([row_of(one) for one in measured]),
        identical_tokens=not differing,
        first_divergence=min(differing, key=lambda one: one.position, default=None),
        differing_outputs=len(differing),
        compared_outputs=sum(len(some) for some in list(outputs.values())[1:]),
    )


def row_of(measured: Measured) -> Row:
    """One run, before it is compared with others."""
    run, batches = measured.run, measured.batches
    found = summarise([one.finished for batch in batches for one in batch.generations])
    speed, seconds = _speed(batches), sum(batch.decode_seconds for batch in batches)
    repeats = sorted({batch.repeat for batch in batches})
    return Row(
        **asdict(replace(found, tokens_per_second=speed, decode_seconds=seconds)),
        **vars(run),
        tokens_per_second_per_sequence=found.tokens_per_second,
        tokens_per_second_per_device=ratio(speed or 0.0, measured.devices),
        tokens_per_second_by_repeat=tuple(_speed([b for b in batches if b.repeat == repeat]) for repeat in repeats),
        devices=measured.devices,
        best=False,
        speedup=None,
    )


def _speed(batches: Sequence[Batch]) -> float | None:
    return ratio(sum(batch.decoded for batch in batches), sum(batch.decode_seconds for batch in batches))


def ranked(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The rows with `best` and `speedup`."""
    best: dict[tuple[Mode, int | None, int], Row] = {}
    for row in sorted(rows, key=lambda row: -(row.tokens_per_second or 0.0)):
        best.setdefault((row.mode, row.drafts, row.batch), row)
    found = []
    for row in rows:
        plain = best.get(("ar", None, row.batch))
        over = ratio(row.tokens_per_second or 0.0, plain.tokens_per_second or 0.0) if plain else None
        found.append(replace(row, best=row is best[row.mode, row.drafts, row.batch], speedup=over or None))
    return tuple(found)


def join_numerics(results: Mapping[str, Results]) -> Results:
    """Results of the same runs in engines that round in different ways; of one alone, those."""
    if len(results) == 1:
        return next(iter(results.values()))
    rows = [
        replace(row, name=row.name if numerics == "fast" else f"{row.name} {numerics}", numerics=numerics)
        for numerics, found in results.items()
        for row in found.runs
    ]
    fast, invariant = (
        {row.name: row.tokens_per_second or 0.0 for row in results[numerics].runs} for numerics in ("fast", "invariant")
    )
    return Results(
        runs=tuple(rows),
        identical_tokens=all(found.identical_tokens for found in results.values()),
        first_divergence=next((one.first_divergence for one in results.values() if one.first_divergence), None),
        differing_outputs=sum(found.differing_outputs for found in results.values()),
        compared_outputs=sum(found.compared_outputs for found in results.values()),
        identical_tokens_by_numerics={name: found.identical_tokens for name, found in results.items()},
        invariant_over_fast={name: ratio(speed, fast[name]) for name, speed in invariant.items()},
    )


def this_machine(cores: Mapping[str, tuple[int, ...]]) -> Machine:
    """Where this process runs, and an engine beside it on these cores."""
    import torch

    from cuda_ext import ops
    from ssd_runtime.host import topology

    return Machine(
        host=platform.node(),
        hardware=tuple(topology.describe().splitlines()),
        system=platform.platform(),
        python=platform.python_version(),
        torch=str(torch.__version__),  # a class of its own
        operators=ops.backend(),
        date=time.strftime("%Y-%m-%d %H:%M:%S%z"),
        cores=dict(cores),
    )
