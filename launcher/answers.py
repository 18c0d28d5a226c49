"""What `ssd generate` prints of a finished request. Knows no engine."""

from __future__ import annotations

import json

import msgspec
from msgspec import Struct

from launcher import screen
from launcher.generation import Generation
from launcher.summary import Summary, summarise
from ssd_runtime.comm.control.client_messages import Usage
from ssd_runtime.config import Mode
from ssd_runtime.speculation.types import TokenLogprob


class Alternative(Struct, frozen=True):
    """One of the likeliest tokens at a place."""

    token: int
    logprob: float


class Logprob(Struct, frozen=True):
    """An emitted token, and the likeliest there."""

    token: int
    logprob: float
    top: tuple[Alternative, ...]

    @classmethod
    def of(cls, one: TokenLogprob) -> Logprob:
        return cls(one.token, one.logprob, tuple(Alternative(*each) for each in one.top))


class Answer(Struct, frozen=True, omit_defaults=True):
    """One output; `logprobs` is left out if nobody asked."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[Logprob, ...] = ()


class Statistics(Summary, frozen=True, kw_only=True):
    """Of one request."""

    mode: Mode


class Told(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What stands beside an answer, or several and what stands beside them.

    Attributes:
        outputs: several answers; one alone stands at the top level instead.
        label: the session's, if it has one.
    """

    label: str | None = None
    outputs: tuple[Answer, ...] = ()
    usage: Usage
    statistics: Statistics


def as_text(generation: Generation) -> str:
    """Several answers, each under a line of its own."""
    reasons = generation.finished.finish_reasons
    return "\n".join(
        f"--- answer {index} ({reason})\n{output.text}"
        for index, (output, reason) in enumerate(zip(generation.outputs, reasons, strict=True))
    )


def as_json(generation: Generation, label: str | None = None) -> str:
    """One answer at the top level; several as a list `outputs`. `label` is the session's."""
    finished = generation.finished
    answers = [
        Answer(output.text, output.token_ids, reason, tuple(map(Logprob.of, output.logprobs)))
        for output, reason in zip(generation.outputs, finished.finish_reasons, strict=True)
    ]
    found = Statistics(mode=finished.statistics.mode, **msgspec.structs.asdict(summarise([finished])))
    several = tuple(answers) if len(answers) > 1 else ()
    told = msgspec.to_builtins(Told(label=label, outputs=several, usage=finished.usage, statistics=found))
    return json.dumps(told if several else msgspec.to_builtins(answers[0]) | told)


def summary_line(generation: Generation, cores: dict[str, tuple[int, ...]], label: str | None = None) -> str:
    """Rates of the request, and on which cores; on a line before them the session's label, if it has one."""
    finished = generation.finished
    found = summarise([finished])
    parts = [
        f"{finished.statistics.mode}: {found.tokens} tokens ({', '.join(finished.finish_reasons)})",
        f"{screen.number(found.tokens_per_second, 1)} tokens/s",
        f"{screen.number(found.tokens_per_round, 2)} tokens a round",
        f"hit rate {screen.percent(found.hit_rate)}",
        f"acceptance {screen.percent(found.acceptance)}",
    ]
    rates = ", ".join(parts) + (f"; {screen.cores_line(cores)}" if cores else "")
    return rates if label is None else f"{label}\n{rates}"
