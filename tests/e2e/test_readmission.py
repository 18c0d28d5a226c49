"""A draft that is lost and comes back in the middle of everything: the same tokens, and the hits return."""

from __future__ import annotations

import functools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.comm.protocol import ProtocolError
from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.engine.request import Request
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.types import Outcome, SamplingParams
from tests.engines import InProcess, in_process, random_steps, request
from tests.tiny_models import tiny_decoder

ENGINE = EngineConfig(max_model_len=200, max_num_seqs=3, block_size=4, prefill_chunk=11)


@functools.cache
def decoder() -> Decoder:
    return tiny_decoder(0)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(random.Random(f"{length}-{seed}").randrange(90) for _ in range(length))


@functools.cache
def alone(asked: Request) -> list[int]:
    """What plain decoding gives this request by itself."""
    plain = request(asked.prompt_tokens, "ar", lookahead=0, max_tokens=asked.max_tokens, params=asked.params)
    (sequence,) = in_process(decoder(), decoder(), ENGINE).run([plain])
    return sequence.tokens


def serve(process: InProcess, asked: list[Request], away: list[tuple[int, int]]) -> list[list[int]]:
    """Serve all; in round a of each (a, b) of `away` the draft dies, in round b it comes back."""
    sequences = [process.engine.add(one) for one in asked]
    events = sorted([(a, process.drop_draft) for a, _ in away] + [(b, process.bring_draft_back) for _, b in away])
    round = 0
    while process.engine.has_work:
        while events and events[0][0] <= round:
            events.pop(0)[1]()
        process.engine.step()
        round += 1
    return [sequence.tokens for sequence in sequences]


@settings(max_examples=15, deadline=None)
@given(
    first=st.integers(0, 12),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3),
    speed=st.integers(0, 10**6),
    backup=st.sampled_from(["draft", "ngram", "none"]),
    modes=st.lists(st.sampled_from(["ssd", "ssd", "sd", "ar"]), min_size=1, max_size=4),
    temperature=st.sampled_from([0.0, 0.9]),
)
def test_a_draft_lost_and_readmitted_at_random_turns_changes_no_token(
    first: int, lengths: list[int], speed: int, backup: str, modes: list[str], temperature: float
) -> None:
    speculation = SpeculationConfig(lookahead=4, budget=5, backup=backup)  # type: ignore[arg-type]
    process = in_process(decoder(), decoder(), ENGINE, speculation, random_steps(speed))
    asked = [
        request(
            prompt(5 + 9 * i, i),
            mode,
            lookahead=4 if mode != "ar" else 0,
            max_tokens=45,
            params=SamplingParams(temperature=temperature, seed=i),
            request_id=str(i),
        )
        for i, mode in enumerate(modes)
    ]
    away, at = [], first
    for length in lengths:
        away.append((at, at + length))
        at += 2 * length + 1
    assert serve(process, asked, away) == [alone(one) for one in asked]
    process.draft.drafter.reset()  # it may have been away at the end
    for allocator in (process.engine.allocator, process.draft.drafter.allocator):
        assert allocator.num_free == allocator.num_blocks


def test_the_hits_return_with_the_draft() -> None:
    """A twin always guesses right, so every round but those without it is a hit of full length."""
    speculation = SpeculationConfig(lookahead=4, budget=4)
    process = in_process(decoder(), decoder(), ENGINE, speculation, 40)
    sequence = process.engine.add(request(prompt(20), lookahead=4, max_tokens=150))
    hits: dict[int, int] = {}  # verification -> whether it was a hit
    while process.engine.has_work:
        if sequence.turn == 10:
            process.drop_draft()
        if sequence.turn == 16 and process.link.drafts.count == 0:
            process.bring_draft_back()
        before = sequence.measured.hits
        process.engine.step()
        hits[sequence.turn - 1] = sequence.measured.hits - before
    assert (process.link.drafts.num_lost, process.link.drafts.num_linked) == (1, 2)
    assert [turn for turn, hit in hits.items() if turn >= 0 and not hit] == [*range(10, 16)]
    assert max(hits) > 25


def test_a_draft_that_comes_during_the_prompt_is_told_only_the_prompt() -> None:
    process = in_process(decoder(), decoder(), ENGINE, SpeculationConfig(lookahead=4), 3)
    asked = request(prompt(40), lookahead=4, max_tokens=20)
    assert serve(process, [asked], [(1, 2)]) == [alone(asked)]
    assert process.link.drafts.num_linked == 2


TAKEN = Admit(0, (1, 2, 3), SamplingParams(), "ssd", 3, 20, output_tokens=(4, 5), turn=2, outcome=Outcome(0, 5))


def test_a_draft_that_takes_over_answers_the_outcome_it_was_told() -> None:
    drafter = Drafter(decoder(), ENGINE, SpeculationConfig(lookahead=3))
    drafter.admit(TAKEN)
    while drafter.grow():
        pass
    (branch,) = drafter.tree().branches
    assert (branch.turn, branch.outcome, len(branch.tokens)) == (1, Outcome(0, 5), 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"outcome": None},
        {"outcome": Outcome(0, 9)},
        {"turn": -1},
        {"turn": -2},
        {"output_tokens": ()},
        {"output_tokens": (4, 5) * 100},
        {"prompt_tokens": (), "turn": -1, "outcome": None, "output_tokens": ()},
    ],
)
def test_what_cannot_be_taken_over_is_refused(changes: dict) -> None:
    drafter = Drafter(decoder(), ENGINE, SpeculationConfig(lookahead=3))
    with pytest.raises(ProtocolError, match="taken over"):
        drafter.admit(Admit(**{**TAKEN.__dict__, **changes}))
