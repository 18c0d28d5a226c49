"""The draft rank's model and trees: what it refuses, and that its pool suffices however it is used."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.types import Outcome, OutcomeFrame, OutcomeRow, Plan, SamplingParams, Source
from tests.engines import in_process, random_steps, request
from tests.tiny_models import tiny_decoder

ENGINE = EngineConfig(max_model_len=32, max_num_seqs=3, block_size=4, prefill_chunk=8)
PROMPT = (5, 6, 7, 8, 9)


@functools.cache
def decoder(seed: int = 0) -> Decoder:
    return tiny_decoder(seed)


def drafter(**speculation: int) -> Drafter:
    return Drafter(decoder(), ENGINE, SpeculationConfig(**({"lookahead": 3, "budget": 4} | speculation)))  # type: ignore[arg-type]


def admit(mode: str = "ssd", lookahead: int = 3) -> Admit:
    return Admit(0, PROMPT, SamplingParams(), mode, lookahead, 20)  # type: ignore[arg-type]


def frame(turn: int, outcome: Outcome, source: Source = Source.PENDING, length: int = 0) -> OutcomeFrame:
    return OutcomeFrame(turn + 1, 0, (OutcomeRow(0, turn, outcome, source, length),))


def test_predrafting_begins_while_the_target_still_computes_the_prompt() -> None:
    draft = drafter()
    draft.admit(admit())
    while draft.grow():
        pass
    branches = draft.tree().branches
    assert len(branches) >= 1
    assert {branch.turn for branch in branches} == {-1}
    assert {len(branch.tokens) for branch in branches} == {3}


def test_without_predrafting_nothing_but_the_prompt_is_computed_unasked() -> None:
    draft = drafter()
    draft.admit(admit("sd"))
    rows = 0
    while step := draft.grow():
        rows += step.rows
    assert rows == len(PROMPT) - 1  # the last token is the root: it waits for its successor
    assert draft.tree().branches == ()


def test_a_branch_that_is_ready_is_told_of_at_once() -> None:
    draft = drafter()
    draft.admit(admit())
    while draft.grow():
        pass
    branch = draft.tree().branches[0]
    assert draft.advance(frame(0, branch.outcome)) is True
    (again,) = draft.tree().branches
    assert (again.turn, again.outcome, again.tokens) == (-1, branch.outcome, branch.tokens)


def test_a_step_is_reported_once() -> None:
    draft = drafter()
    draft.admit(admit())
    while draft.tree().step_rows == 0:
        assert draft.grow()
    assert (draft.tree().step_us, draft.tree().step_rows) == (0, 0)


def test_a_longer_lookahead_than_agreed_is_refused() -> None:
    with pytest.raises(ProtocolError, match="lookahead 4 is above the agreed 3"):
        drafter().admit(admit(lookahead=4))


@pytest.mark.parametrize(
    ("outcomes", "message"),
    [
        ([frame(1, Outcome(0, 5))], "turn 1 after turn -1"),
        ([frame(0, Outcome(1, 5))], "without a speculation that long"),
        ([frame(0, Outcome(0, 5)), frame(1, Outcome(0, 5))], "without a speculation that long"),  # never resolved
        ([frame(0, Outcome(0, 5), Source.NONE), frame(1, Outcome(1, 5))], "without a speculation that long"),
    ],
)
def test_an_outcome_that_cannot_be_is_refused(outcomes: list[OutcomeFrame], message: str) -> None:
    draft = drafter()
    draft.admit(admit())
    *before, last = outcomes
    for one in before:
        draft.advance(one)
    with pytest.raises(ProtocolError, match=message):
        draft.advance(last)


def test_outcomes_of_a_finished_sequence_are_nothing() -> None:
    draft = drafter()
    draft.admit(admit())
    draft.grow()
    draft.finish(0)
    draft.finish(0)
    assert draft.advance(frame(0, Outcome(0, 5))) is False
    assert draft.grow() is None
    assert draft.allocator.num_free == draft.allocator.num_blocks


@settings(max_examples=40, deadline=None)
@given(
    fan_out=st.sampled_from(["uniform", "geometric", "confidence"]),
    backup=st.sampled_from(["draft", "ngram", "none"]),
    lookahead=st.integers(1, 6),
    budget=st.integers(1, 12),
    recycle=st.integers(0, 3),
    seed=st.integers(0, 1000),
    modes=st.lists(st.sampled_from(["ssd", "ssd", "sd"]), min_size=3, max_size=6),
    alike=st.booleans(),
)
def test_the_pool_suffices_when_every_sequence_fills_its_share(
    fan_out: str, backup: str, lookahead: int, budget: int, recycle: int, seed: int, modes: list[str], alike: bool
) -> None:
    speculation = SpeculationConfig(
        lookahead=lookahead,
        budget=budget,
        recycle=recycle,
        fan_out=fan_out,
        backup=backup,  # type: ignore[arg-type]
    )
    # Of one prompt three run at once in a pool for less than three: they share a block of it.
    sizes = replace(ENGINE, num_blocks=22) if alike else ENGINE
    process = in_process(decoder(0), decoder(seed % 2), sizes, speculation, random_steps(seed, most=20))
    asked = [
        request(
            tuple(range(1, 9)) if alike else tuple(range(1 + i, 9 + i)),
            mode,
            lookahead=lookahead,
            max_tokens=24,
            params=SamplingParams(temperature=0.5 * (i % 3), seed=i),
            request_id=str(i),
        )
        for i, mode in enumerate(modes)
    ]
    sequences = process.run(asked)
    assert [sequence.num_output for sequence in sequences] == [24] * len(asked)
    assert process.link.drafts.num_lost == 0
    process.assert_all_blocks_are_back()


def test_a_plan_of_nothing_rests_the_draft_and_the_next_plan_wakes_it() -> None:
    draft = drafter()
    draft.admit(admit())
    while draft.grow():
        pass
    chosen = draft.tree().branches[0].outcome
    for turn, plan in enumerate([Plan(0, 0)] * 5):
        outcome = chosen if turn == 0 else Outcome(0, 7)
        told = frame(turn, outcome, Source.NONE)
        draft.advance(OutcomeFrame(told.round, 0, told.rows, plan))
        assert draft.grow() is None
    told = frame(5, Outcome(0, 7), Source.NONE)
    draft.advance(OutcomeFrame(told.round, 0, told.rows, Plan(2, 4)))
    while draft.grow():
        pass
    branches = draft.tree().branches
    assert 1 <= len(branches) <= 4
    assert {len(branch.tokens) for branch in branches} == {2}
    assert {branch.turn for branch in branches} == {5}


def test_a_branch_that_is_asked_for_does_not_mind_the_plan() -> None:
    draft = drafter()
    draft.admit(admit())
    told = frame(0, Outcome(0, 7))
    draft.advance(OutcomeFrame(told.round, 0, told.rows, Plan(1, 1)))
    while draft.grow():
        pass
    (branch,) = draft.tree().branches
    assert len(branch.tokens) == 3
