"""Several drafts divide the outcomes of every sequence: more hits for the same budget each, and any may die alone."""

from __future__ import annotations

import functools

import pytest

from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process, request
from tests.tiny_models import tiny_decoder

ENGINE = EngineConfig(max_model_len=256, max_num_seqs=4, block_size=4)
PROMPT = tuple(range(5, 25))


@functools.cache
def decoder(seed: int) -> Decoder:
    return tiny_decoder(seed)


def serving(num_drafts: int, **speculation: object) -> InProcess:
    """A target and drafts of another model, so that misses are the rule."""
    config = SpeculationConfig(**({"lookahead": 3, "budget": 2, "recycle": 0, "backup": "none"} | speculation))  # type: ignore[arg-type]
    return in_process(decoder(0), decoder(1), ENGINE, config, 12, num_drafts=num_drafts)


def asked(count: int = 1, mode: str = "ssd") -> list:
    return [
        request(
            PROMPT[i:],
            mode,
            lookahead=3 if mode == "ssd" else 0,
            max_tokens=150,
            params=SamplingParams(temperature=0.8, seed=i),
            request_id=str(i),
        )
        for i in range(count)
    ]


@functools.cache
def alone(count: int) -> list[list[int]]:
    return [sequence.tokens for sequence in serving(1).run(asked(count, "ar"))]


def hits(num_drafts: int, count: int, **speculation: object) -> int:
    sequences = serving(num_drafts, **speculation).run(asked(count))
    assert [sequence.tokens for sequence in sequences] == alone(count)
    return sum(sequence.measured.hits for sequence in sequences)


def test_more_drafts_of_the_same_budget_hit_more_often() -> None:
    one, two, three = (hits(n, 1, fan_out="uniform") for n in (1, 2, 3))
    assert one < two < three


def test_a_batch_is_divided_too() -> None:
    assert hits(1, 3, fan_out="uniform") < hits(2, 3, fan_out="uniform")


def test_drafts_do_not_prepare_for_the_same_outcome_twice() -> None:
    process = serving(3, fan_out="uniform", budget=4)
    sequence = process.engine.add(asked()[0])
    while sequence.turn < 3:
        process.engine.step()
    prepared = [
        {(branch.turn, branch.outcome) for branch in draft.drafter.tree().branches}
        for draft in (process.draft, *process.helpers)
    ]
    assert all(prepared)
    assert sum(map(len, prepared)) == len(set.union(*prepared))


@pytest.mark.parametrize("backup", ["none", "ngram", "draft"])
def test_any_of_them_may_die_alone(backup: str) -> None:
    process = serving(3, backup=backup)
    sequences = [process.engine.add(one) for one in asked(2)]
    while process.engine.has_work:
        process.engine.step()
        process.helpers[0].dead = sequences[0].turn > 20
        process.draft.dead = sequences[0].turn > 40
    assert [sequence.tokens for sequence in sequences] == alone(2)
    assert process.link.drafts.count == 1
    assert process.link.drafts.num_lost == 2
    assert process.helpers[1].drafter._share == (0, 1)  # the last one has all of it


def test_a_share_that_is_none_is_refused() -> None:
    drafter = Drafter(decoder(1), ENGINE, SpeculationConfig())
    with pytest.raises(ProtocolError, match="share 2 of 2"):
        drafter.share(2, 2)
