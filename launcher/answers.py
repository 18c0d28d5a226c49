"""What `ssd generate` prints of a finished request. Knows no engine."""

from __future__ import annotations

import json
from typing import Any

from msgspec import to_builtins

from launcher import screen
from launcher.generation import Generation, Output
from launcher.summary import summarise


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
    outputs = [
        _output(output, reason) for output, reason in zip(generation.outputs, finished.finish_reasons, strict=True)
    ]
    told = {
        **({} if label is None else {"label": label}),
        **(outputs[0] if len(outputs) == 1 else {"outputs": outputs}),
        "usage": to_builtins(finished.usage),
        "statistics": {"mode": finished.statistics.mode, **to_builtins(summarise([finished]))},
    }
    return json.dumps(told)


def _output(output: Output, reason: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"text": output.text, "token_ids": output.token_ids, "finish_reason": reason}
    if output.logprobs:
        answer["logprobs"] = [
            {
                "token": one.token,
                "logprob": one.logprob,
                "top": [{"token": token, "logprob": logprob} for token, logprob in one.top],
            }
            for one in output.logprobs
        ]
    return answer


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
