"""Whether runs gave the same tokens, and how close the call was where they part. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from launcher.bench.prompts import Prompt
from launcher.bench.report import Generation


def compare(results: Mapping[str, Sequence[Generation]], prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Whether every run gave the tokens of the first run, and else where they part first.

    They must with the compiled operators, and with `engine.numerics = "invariant"`. In bf16 and int8 plain torch rounds
    a forward over several rows differently from a forward over one, so near-ties may fall the other way.

    Args:
        results: of each run, the generations of prompt 0, 1, ..., once a repeat.
    """
    (reference, expected), *others = results.items()
    first: dict[str, Any] | None = None
    differing = 0
    for name, generations in others:
        for turn, (mine, theirs) in enumerate(zip(generations, expected, strict=True)):
            position = divergence(mine.token_ids, theirs.token_ids)
            if position is None:
                continue
            differing += 1
            if first is None or position < first["position"]:
                first = {
                    "position": position,
                    "prompt": prompts[turn % len(prompts)].id,
                    "prompt_index": turn % len(prompts),
                    "runs": [reference, name],
                    "tokens": [_token(theirs.token_ids, position), _token(mine.token_ids, position)],
                    "before": list(theirs.token_ids[:position]),
                }
    comparisons = sum(len(generations) for _, generations in others)
    return {
        "identical_tokens": differing == 0,
        "first_divergence": first,
        "differing_outputs": differing,
        "compared_outputs": comparisons,
    }


def divergence(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The first index at which two sequences differ (one may end there); None if they are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def _token(tokens: Sequence[int], position: int) -> int | None:
    """The token there; None if the output ends before."""
    return tokens[position] if position < len(tokens) else None
