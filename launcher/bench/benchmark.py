"""The benchmark: the same prompts and seeds in every mode, in turns, prompt by prompt or batch by batch in one engine.

Owns the plan and the measuring. Knows nothing of ranks or terminals.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from launcher.bench.divergence import compare
from launcher.bench.prompts import Prompt
from launcher.bench.report import Batch, Generation, Output, rank_runs, summarise_batches
from ssd_runtime.comm.control.client_messages import ChatMessage, Chunk, Finished, Generate
from ssd_runtime.config import MODES, NUMERICS, Config, Mode, Numerics
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.allotment import gpus_of
from ssd_runtime.host.cores import Role
from ssd_runtime.metrics import ratio
from ssd_runtime.speculation.types import SamplingParams

WARM_UP_TOKENS = 16


class Generates(Protocol):
    """What the benchmark needs of a client."""

    def generate_together(self, requests: Sequence[Generate]) -> Iterator[Chunk | Finished]: ...


@dataclass(frozen=True)
class Run:
    """One row of the table: a mode at one lookahead, with so many requests at once.

    Attributes:
        drafts, budget: of its engine, and of each draft, where their number is compared (`draft_setups.py`).
    """

    name: str
    mode: Mode
    lookahead: int
    batch: int = 1
    drafts: int | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Workload:
    """What every run is given.

    Attributes:
        prompts: in this order; prompt i is generated with seed `params.seed` + i.
        params: how tokens are chosen.
        max_tokens: of each prompt.
        repeat: how often all of it is measured.
        devices: how many cores (or GPUs) each mode uses, for the speed per device.
        ignore_eos: whether every output is `max_tokens` long.
    """

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    max_tokens: int
    repeat: int = 1
    devices: Mapping[Mode, int] = field(default_factory=dict)
    ignore_eos: bool = False


def plan_runs(
    modes: Sequence[str], lookaheads: Sequence[str], default: int, batches: Sequence[int] = (1,)
) -> list[Run]:
    """The runs of `--modes`, of each `--lookahead mode=K,K,...` and of `--batch`.

    A mode with several K becomes several runs mode@K; a batch of b several runs "mode xb".

    Raises:
        ConfigError: an unknown or repeated mode, or a lookahead that is not a list of numbers for one of the modes.
    """
    chosen: dict[str, list[int]] = {}
    for mode in modes:
        if mode not in MODES:
            raise ConfigError(f"--modes: unknown mode {mode!r}; known: {', '.join(MODES)}")
        if mode in chosen:
            raise ConfigError(f"--modes: {mode} is there twice")
        chosen[mode] = [0 if mode == "ar" else default]
    for text in lookaheads:
        mode, equals, values = text.partition("=")
        if not equals or not all(value.strip().isdigit() and int(value) > 0 for value in values.split(",")):
            raise ConfigError(f"--lookahead {text!r}: expected MODE=K or MODE=K,K,... as in ssd=3,5")
        if mode not in chosen or mode == "ar":
            known = ", ".join(mode for mode in chosen if mode != "ar") or "none that speculates"
            raise ConfigError(f"--lookahead {text!r}: {mode} is not among the modes to run ({known})")
        chosen[mode] = sorted({int(value) for value in values.split(",")})
    return [
        Run(
            (f"{mode}@{lookahead}" if len(several) > 1 else mode) + (f" x{batch}" if batch > 1 else ""),
            mode,  # type: ignore[arg-type]
            lookahead,
            batch,
        )
        for batch in sorted(set(batches))
        for mode, several in chosen.items()
        for lookahead in several
    ]


def parse_batches(text: str) -> list[int]:
    """The sizes of `--batch`; raises ConfigError unless it is a list of numbers above 0."""
    if not all(value.strip().isdigit() and int(value) > 0 for value in text.split(",")):
        raise ConfigError(f"--batch {text!r}: expected numbers of requests above 0, as in 1,2,4")
    return [int(value) for value in text.split(",")]


@dataclass(frozen=True)
class Measured:
    """What a run was measured at, on so many cores (or GPUs)."""

    run: Run
    batches: Sequence[Batch]
    devices: int


def measure(
    client: Generates, runs: Sequence[Run], workload: Workload, advance: Callable[[str], None]
) -> list[Measured]:
    """Run the workload in every mode.

    Args:
        client: of one engine; modes and lookaheads are fields of each request.
        runs: which take turns at each prompt (those of one batch size at each batch); who goes first rotates.
        workload: the same for all.
        advance: called after each batch with the name of its run; `count_steps` times.
    """
    for run in runs:
        warm_up = [_request(run, prompt, workload, workload.params.seed) for prompt in workload.prompts[: run.batch]]
        generate_together(client, [replace(request, max_tokens=WARM_UP_TOKENS) for request in warm_up])
        advance(run.name)
    results: dict[str, list[Batch]] = {run.name: [] for run in runs}
    turn = 0
    for repeat in range(workload.repeat):
        for batch in sorted({run.batch for run in runs}):
            together = [run for run in runs if run.batch == batch]
            for start in range(0, len(workload.prompts), batch):
                first = turn % len(together)
                turn += 1
                for run in (*together[first:], *together[:first]):
                    requests = [
                        _request(run, prompt, workload, workload.params.seed + index)
                        for index, prompt in enumerate(workload.prompts[start : start + batch], start)
                    ]
                    results[run.name].append(Batch(repeat, generate_together(client, requests)))
                    advance(run.name)
    return [Measured(run, results[run.name], workload.devices.get(run.mode, 1)) for run in runs]


def report_on(measured: Sequence[Measured], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """The report on runs of one workload (without "machine"): a row for each, and whether their tokens are the same."""
    rows, outputs = [], {}
    for one in measured:
        run = one.run
        about: dict[str, Any] = {"name": run.name, "mode": run.mode, "lookahead": run.lookahead, "batch": run.batch}
        if run.drafts is not None:
            about |= {"drafts": run.drafts, "budget": run.budget}
        rows.append(about | summarise_batches(one.batches, one.devices))
        outputs[run.name] = [generation for batch in one.batches for generation in batch.generations]
    return {"runs": rank_runs(rows), **compare(outputs, prompts)}


def devices_by_mode(config: Config, cores: Mapping[str, Sequence[int]]) -> dict[Mode, int]:
    """How many cores, or GPUs where a role runs on them, the ranks that a mode uses have.

    Args:
        cores: of each rank of the leader's host, in the order of the ranks; drafts that are elsewhere count as one.
    """
    roles: list[Role] = ["target" if name.split()[0] == "target" else "draft" for name in cores]
    used: dict[Role, set[tuple[str, int]]] = {"target": set(), "draft": set()}
    for role, gpu, numbers in zip(roles, gpus_of(config, roles), cores.values(), strict=True):
        used[role] |= {("core", core) for core in numbers} if gpu is None else {("gpu", gpu)}
    target = max(1, len(used["target"]))
    both = max(1, len(used["target"] | used["draft"])) if "draft" in roles else target + 1
    return {"ar": target, "sd-colocated": target, "sd": both, "ssd": both}


def join_numerics(reports: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Reports of the same runs in engines that round in different ways, as one report; of one alone, that one."""
    if len(reports) == 1:
        return next(iter(reports.values()))
    rows = []
    for numerics, report in reports.items():
        suffix = "" if numerics == "fast" else f" {numerics}"
        rows += [row | {"name": row["name"] + suffix, "numerics": numerics} for row in report["runs"]]
    speeds = {
        numerics: {row["name"]: row["tokens_per_second"] for row in report["runs"]}
        for numerics, report in reports.items()
    }
    costs = {name: ratio(speed or 0.0, speeds["fast"][name] or 0.0) for name, speed in speeds["invariant"].items()}
    differing = [report for report in reports.values() if not report["identical_tokens"]]
    return {
        **next(iter(reports.values())),
        "runs": rows,
        "identical_tokens": not differing,
        "first_divergence": differing[0]["first_divergence"] if differing else None,
        "differing_outputs": sum(report["differing_outputs"] for report in reports.values()),
        "compared_outputs": sum(report["compared_outputs"] for report in reports.values()),
        "identical_tokens_by_numerics": {name: report["identical_tokens"] for name, report in reports.items()},
        "invariant_over_fast": costs,
    }


def parse_numerics(text: str) -> list[Numerics]:
    """The settings of `--numerics`; raises ConfigError for one that is unknown."""
    found: list[Numerics] = []
    for value in map(str.strip, text.split(",")):
        if value not in NUMERICS:
            raise ConfigError(f"--numerics: unknown {value!r}; known: {', '.join(NUMERICS)}")
        found.append(value)
    return list(dict.fromkeys(found))


def count_steps(runs: Sequence[Run], workload: Workload) -> int:
    """How often `measure` calls `advance`."""
    return sum(1 + workload.repeat * -(-len(workload.prompts) // run.batch) for run in runs)


def generate(client: Generates, request: Generate, on_text: Callable[[str], None]) -> Generation:
    """Run one request to its end, telling `on_text` each piece of text as it comes."""
    (generation,) = generate_together(client, [request], on_text)
    return generation


def generate_together(
    client: Generates, requests: Sequence[Generate], on_text: Callable[[str], None] | None = None
) -> list[Generation]:
    """Run requests to their ends, all at once."""
    outputs = {request.request_id: [Output()] * request.n for request in requests}
    finished: dict[str, Finished] = {}
    stream = cast(Generator[Chunk | Finished, None, None], client.generate_together(requests))
    with contextlib.closing(stream) as events:  # left early, they are cancelled now and not by the garbage collector
        for event in events:
            if isinstance(event, Finished):
                finished[event.request_id] = event
                continue
            outputs[event.request_id][event.index] += event
            if on_text is not None:
                on_text(event.text)
    assert len(finished) == len(requests), "the client's stream ended without Finished"
    return [Generation(tuple(outputs[key]), finished[key]) for key in outputs]


def _request(run: Run, prompt: Prompt, workload: Workload, seed: int) -> Generate:
    return Generate(
        stream=False,
        samples=True,
        request_id=uuid.uuid4().hex,
        messages=(ChatMessage("user", prompt.prompt),),
        params=replace(workload.params, seed=seed),
        max_tokens=workload.max_tokens,
        mode=run.mode,
        lookahead=run.lookahead,
        ignore_eos=workload.ignore_eos,
    )
