"""The benchmark: the same prompts and seeds in every mode, interleaved prompt by prompt in one engine.

Owns the plan, the measuring and the comparison of the tokens. Knows nothing of ranks or terminals.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

from launcher.prompts import Prompt
from launcher.report import Generation, Output, summarise
from ssd_runtime.comm.messages import ChatMessage, Chunk, Finished, Generate
from ssd_runtime.config import MODES, Mode
from ssd_runtime.errors import ConfigError
from ssd_runtime.speculation.types import SamplingParams

WARM_UP_TOKENS = 16


class Generates(Protocol):
    """What the benchmark needs of a client."""

    def generate(self, request: Generate) -> Iterator[Chunk | Finished]: ...


@dataclass(frozen=True)
class Run:
    """One row of the table: a mode at one lookahead."""

    name: str
    mode: Mode
    lookahead: int


@dataclass(frozen=True)
class Workload:
    """What every run is given.

    Attributes:
        prompts: in this order; prompt i is generated with seed `params.seed` + i.
        params: how tokens are chosen.
        max_tokens: of each prompt.
        repeat: how often all of it is measured.
    """

    prompts: tuple[Prompt, ...]
    params: SamplingParams
    max_tokens: int
    repeat: int = 1


def plan_runs(modes: Sequence[str], lookaheads: Sequence[str], default: int) -> list[Run]:
    """The runs of `--modes` and of each `--lookahead mode=K,K,...`; a mode with several K becomes several runs mode@K.

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
        Run(f"{mode}@{lookahead}" if len(several) > 1 else mode, mode, lookahead)  # type: ignore[arg-type]
        for mode, several in chosen.items()
        for lookahead in several
    ]


def measure(
    client: Generates, runs: Sequence[Run], workload: Workload, advance: Callable[[str], None]
) -> dict[str, Any]:
    """Run the workload in every mode and return the report (without "machine").

    Args:
        client: of one engine; modes and lookaheads are fields of each request.
        runs: which take turns at each prompt; who goes first rotates.
        workload: the same for all.
        advance: called after each request with the name of its run.
    """
    for run in runs:
        generate(client, _request(run, workload.prompts[0], workload.params, WARM_UP_TOKENS), _unseen)
        advance(run.name)
    results: dict[str, list[Generation]] = {run.name: [] for run in runs}
    for turn in range(workload.repeat * len(workload.prompts)):
        index = turn % len(workload.prompts)
        params = replace(workload.params, seed=workload.params.seed + index)
        first = turn % len(runs)
        for run in (*runs[first:], *runs[:first]):
            request = _request(run, workload.prompts[index], params, workload.max_tokens)
            results[run.name].append(generate(client, request, _unseen))
            advance(run.name)
    return {"runs": _rows(runs, results, len(workload.prompts)), **compare(results, workload.prompts)}


def generate(client: Generates, request: Generate, on_text: Callable[[str], None]) -> Generation:
    """Run one request to its end, telling `on_text` each piece of text as it comes."""
    outputs = [Output()] * request.n
    stream = cast(Generator[Chunk | Finished, None, None], client.generate(request))
    with contextlib.closing(
        stream
    ) as events:  # left early, the request is cancelled now and not by the garbage collector
        for event in events:
            if isinstance(event, Finished):
                return Generation(tuple(outputs), event)
            outputs[event.index] += event
            on_text(event.text)
    raise AssertionError("the client's stream ended without Finished")


def compare(results: dict[str, list[Generation]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Whether every run gave the tokens of the first run, and else where they part first.

    They must with the compiled operators and in fp32. In bf16 and int8 plain torch rounds a forward over several rows
    differently from a forward over one, so near-ties may fall the other way.
    """
    (reference, expected), *others = results.items()
    first: tuple[int, str, str] | None = None  # position, prompt, run
    differing = 0
    for name, generations in others:
        for turn, (mine, theirs) in enumerate(zip(generations, expected, strict=True)):
            position = divergence(mine.token_ids, theirs.token_ids)
            if position is None:
                continue
            differing += 1
            if first is None or position < first[0]:
                first = (position, prompts[turn % len(prompts)].id, name)
    comparisons = sum(len(generations) for _, generations in others)
    return {
        "identical_tokens": differing == 0,
        "first_divergence": first and {"position": first[0], "prompt": first[1], "runs": [reference, first[2]]},
        "differing_outputs": differing,
        "compared_outputs": comparisons,
    }


def divergence(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The first index at which two sequences differ (one may end there); None if they are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def _unseen(text: str) -> None:
    """The benchmark shows no text."""


def _request(run: Run, prompt: Prompt, params: SamplingParams, max_tokens: int) -> Generate:
    return Generate(
        stream=False,
        request_id=uuid.uuid4().hex,
        messages=(ChatMessage("user", prompt.prompt),),
        params=params,
        max_tokens=max_tokens,
        mode=run.mode,
        lookahead=run.lookahead,
    )


def _rows(runs: Sequence[Run], results: dict[str, list[Generation]], per_repeat: int) -> list[dict[str, Any]]:
    rows = []
    for run in runs:
        finished = [generation.finished for generation in results[run.name]]
        repeats = [summarise(finished[i : i + per_repeat]) for i in range(0, len(finished), per_repeat)]
        speeds = [one["tokens_per_second"] for one in repeats]
        rows.append({"name": run.name, "mode": run.mode, "lookahead": run.lookahead, **summarise(finished)})
        rows[-1]["tokens_per_second_by_repeat"] = speeds
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        speed = row["tokens_per_second"] or 0.0
        if row["mode"] not in best or speed > (best[row["mode"]]["tokens_per_second"] or 0.0):
            best[row["mode"]] = row
    plain = best["ar"]["tokens_per_second"] if "ar" in best else None
    for row in rows:
        row["best"] = row is best[row["mode"]]
        row["speedup"] = row["tokens_per_second"] / plain if plain and row["tokens_per_second"] else None
    return rows
