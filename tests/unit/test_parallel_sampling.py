"""Ranks that share a vocabulary choose over their slices: the tokens of the whole logits, for a few bytes a row."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuda_ext.ops import Span
from ssd_runtime.errors import PeerLost
from ssd_runtime.leader.forward_codec import decode_choices, encode_choices
from ssd_runtime.leader.replay import NOTHING, FrameKind, LeadingDecoder, answer_idle
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.speculation.sampling.processors import LogitsProcessors, Tally, processors_of
from ssd_runtime.speculation.sampling.ranking import Choice, choose, count_rows, row_by_row
from ssd_runtime.speculation.types import SamplingParams
from tests.target_ranks import parallel_decoder
from tests.tiny_models import RandomWeights, tiny_architecture

VOCAB = 9001
BLOCK = 8
ROWS = 6
THREE: dict[str, Any] = {"num_heads": 6, "num_kv_heads": 3, "intermediate_size": 48, "vocab_size": VOCAB}

TOKENS = st.lists(st.integers(0, 2**31), max_size=4, unique=True).map(tuple)
REAL = st.floats(-100, 100)
TALLIES = st.builds(
    Tally,
    repetition_penalty=st.floats(0.1, 3.0),
    frequency_penalty=REAL,
    presence_penalty=REAL,
    counts=st.dictionaries(st.integers(0, 2**31), st.integers(0, 99), max_size=4),
    num_output=st.integers(0, 99),
    bias=st.dictionaries(st.integers(0, 2**31), REAL, max_size=3),
    allowed=st.none() | TOKENS,
    banned=TOKENS,
    end_tokens=TOKENS,
    min_tokens=st.integers(0, 9),
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**40),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**64 - 1),
)


@st.composite
def asked(draw) -> tuple[Choice, Tally | None]:
    first, count = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    tally = draw(st.none() | TALLIES)
    speculated = draw(st.lists(st.integers(0, 2**31), min_size=7, max_size=7).map(tuple))
    processors = None if tally is None else LogitsProcessors(tally, 2**31)
    return Choice(draw(PARAMS), draw(st.integers(0, 2**40)), range(first, first + count), speculated, processors), tally


@settings(max_examples=100, deadline=None)
@given(many=st.lists(asked(), max_size=3))
def test_choices_arrive_as_they_were_sent(many):
    arrived = decode_choices(encode_choices([choice for choice, _ in many]), 2**31)
    for found, (choice, tally) in zip(arrived, many, strict=True):
        assert [one.key for one in row_by_row([found])] == [one.key for one in row_by_row([choice])]
        for name in ("temperature", "top_k", "top_p", "min_p"):
            assert getattr(found.params, name) == getattr(choice.params, name)
        if tally is not None:  # nobody else looks at them
            assert [found.speculated[:row] for row in found.rows] == [choice.speculated[:row] for row in choice.rows]
        assert found.rows == choice.rows
        assert (found.processors and found.processors.tally) == tally


@pytest.mark.parametrize("change", [lambda words: words[:-1], lambda words: torch.cat((words, words[:1]))])
def test_words_that_are_no_choices_lose_the_leader(change):
    words = encode_choices([Choice(SamplingParams(1.0), 3, range(2))])
    with pytest.raises(PeerLost, match="do not say what to choose"):
        decode_choices(change(words), 99)


class Counted:
    """What the leader says and hears: frames by kind, and the bytes that it sends to each operation, by dtype."""

    def __init__(self, leader: LeadingDecoder) -> None:
        self.leader, self.frames, self.gathered = leader, Counter[FrameKind](), Counter[torch.dtype]()
        send, gather = leader._send, leader._frames.gather

        def sending(kind: FrameKind, payload: torch.Tensor) -> None:
            self.frames[kind] += 1
            send(kind, payload)

        def gathering(x: torch.Tensor) -> torch.Tensor:
            self.gathered[x.dtype] += x.nbytes
            return gather(x)

        leader._send, leader._frames.gather = sending, gathering  # type: ignore[method-assign]

    def clear(self) -> None:
        self.frames.clear()
        self.gathered.clear()


@pytest.fixture(scope="module")
def three() -> Iterator[Counted]:
    """A leader whose vocabulary lies on three ranks, unevenly."""
    with parallel_decoder(RandomWeights(tiny_architecture(**THREE), seed=2), 3, BLOCK) as leader:
        yield Counted(leader)


def batch() -> ForwardBatch:
    positions = torch.arange(ROWS)
    tokens = torch.tensor([5, 8000, 3, 4444, 17, 9000])
    nothing = torch.empty(ROWS, 0, dtype=torch.int64)
    return ForwardBatch(
        *(tokens, positions, positions, positions * 0, torch.arange(16)[None], positions + 1, nothing),
        spans=(Span(ROWS, ROWS),),
    )


def compared(three: Counted, choices: list[Choice], first_row: int = 0) -> list[int]:
    """Choose by reports; the tokens must be those of the gathered logits."""
    kv = three.leader.new_kv(16)
    logits_RV = three.leader.forward(batch(), kv)
    three.clear()
    found = three.leader.choose(batch(), three.leader.new_kv(16), choices, first_row)
    assert found == choose(logits_RV[first_row : first_row + count_rows(choices)], choices)
    return found


def test_greedy_and_sampled_rows_cost_sixteen_bytes_a_rank(three):
    compared(three, [Choice(SamplingParams(), 1, range(3)), Choice(SamplingParams(1.0, seed=4), 9, range(3))])
    assert three.frames == {FrameKind.NEW_KV: 1, FrameKind.CHOOSE: 1}
    assert three.gathered[torch.float64] == 16 * ROWS
    layers = three.gathered.total() - 16 * ROWS
    three.clear()
    three.leader.forward(batch(), three.leader.new_kv(16))
    assert three.gathered.total() == layers + ROWS * 4 * (-(-VOCAB // 3))  # 12 KB a row


def test_processors_reach_the_rank_of_each_token(three):
    """Bans what would be chosen, row after row, so that every slice has its turn."""
    seen: set[int] = set()
    for _ in range(12):
        banned = tuple(sorted(seen))
        params = SamplingParams(
            0.7, seed=1, banned_tokens=banned, repetition_penalty=1.3, frequency_penalty=0.5, logit_bias=((4444, 3.0),)
        )
        processors = processors_of(params, (5, 8000), VOCAB)
        assert processors is not None
        processors.extend((3, 3, 4444))
        seen.update(compared(three, [Choice(params, 1, range(1, 1 + ROWS), (17, 9000, 1, 2, 3, 4), processors)]))
        assert FrameKind.FORWARD not in three.frames
    assert {token // 3001 for token in seen} == {0, 1, 2}


@pytest.mark.parametrize(
    ("params", "kinds"),
    [
        (SamplingParams(0.2, top_k=9, top_p=0.9, min_p=0.01), {FrameKind.CHOOSE}),
        (SamplingParams(100.0, top_p=0.5), {FrameKind.CHOOSE, FrameKind.WHOLE_ROWS}),
        (SamplingParams(1.0, top_k=500), {FrameKind.FORWARD}),
        (SamplingParams(1.0, allowed_tokens=tuple(range(VOCAB))), {FrameKind.FORWARD}),
    ],
)
def test_what_slices_cannot_tell_is_gathered_whole(three, params, kinds):
    processors = processors_of(params, (), VOCAB)
    compared(three, [Choice(params, 40, range(1), (), processors), Choice(SamplingParams(), 3)], first_row=2)
    assert set(three.frames) == {FrameKind.NEW_KV} | kinds


def test_a_forward_without_choices_gathers_no_logits(three):
    assert compared(three, []) == []
    assert three.gathered[torch.float64] == 0
    assert three.gathered.total() < 4 * VOCAB


def test_idle_frames_between_reports_and_whole_rows_change_nothing(three):
    """The heart may beat before the rows that could not be told are asked for."""
    leader, announced = three.leader, three.leader._announced

    @contextlib.contextmanager
    def late(kind: FrameKind, payload: torch.Tensor) -> Iterator[None]:
        if kind is FrameKind.WHOLE_ROWS:
            with leader._lock:
                leader._send(FrameKind.IDLE, NOTHING)
                answer_idle(leader._frames, leader._serial)
        with announced(kind, payload):
            yield

    leader._announced = late  # type: ignore[method-assign]
    try:
        compared(three, [Choice(SamplingParams(100.0, top_p=0.5), 1, range(ROWS))])
    finally:
        leader._announced = announced  # type: ignore[method-assign]
    assert three.frames[FrameKind.IDLE] >= 1
    assert three.frames[FrameKind.WHOLE_ROWS] == 1
