"""Whether runs gave the same tokens, and how close the call was where they part. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from launcher.bench.prompts import Prompt
from launcher.generation import Generation


class Divergence(Struct, frozen=True):
    """Where two runs part.

    Attributes:
        position: of the first token that differs.
        prompt, prompt_index: of which output; its id, and its place in the set.
        runs, tokens: their names, and what each has there; None for an output that had ended.
        before: the tokens that both have.
        logit_gap: how much higher the first token's score was than the second's; None if not known.
    """

    position: int
    prompt: str
    prompt_index: int
    runs: tuple[str, str]
    tokens: tuple[int | None, int | None]
    before: tuple[int, ...]
    logit_gap: float | None = None


def divergences(results: Mapping[str, Sequence[Generation]], prompts: Sequence[Prompt]) -> list[Divergence]:
    """Every output that is not that of the first run.

    There must be none with the compiled operators, and with `engine.numerics = "invariant"`. In bf16 and int8 plain
    torch rounds a forward over several rows differently from one over one, so near-ties may fall the other way.

    Args:
        results: of each run, the generations of prompt 0, 1, ..., once a repeat.
    """
    (reference, expected), *others = results.items()
    found: list[Divergence] = []
    for name, generations in others:
        for turn, (mine, theirs) in enumerate(zip(generations, expected, strict=True)):
            position = divergence(mine.token_ids, theirs.token_ids)
            if position is not None:
                index = turn % len(prompts)
                tokens = _token(theirs.token_ids, position), _token(mine.token_ids, position)
                where = prompts[index].id, index, (reference, name)
                found.append(Divergence(position, *where, tokens, theirs.token_ids[:position]))
    return found


def divergence(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    """The first index at which two sequences differ (one may end there); None if they are equal."""
    for index, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            return index
    return None if len(tokens) == len(others) else min(len(tokens), len(others))


def _token(tokens: Sequence[int], position: int) -> int | None:
    """The token there; None if the output ends before."""
    return tokens[position] if position < len(tokens) else None
