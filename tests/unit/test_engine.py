"""The engine's edges: what it refuses, what a cancelled request leaves behind, who waits for whom."""

from __future__ import annotations

import functools
import tracemalloc
from dataclasses import replace

import pytest

from ssd_runtime.config import EngineConfig, SpeculationConfig
from ssd_runtime.engine.request import Request
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.errors import RequestError
from ssd_runtime.kv.table import BlockTable
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process, request
from tests.tiny_models import tiny_decoder

ENGINE = EngineConfig(max_model_len=64, max_num_seqs=3, block_size=4, prefill_chunk=8)
PROMPT = (5, 6, 7, 8, 9)


@functools.cache
def decoder(seed: int = 0) -> Decoder:
    return tiny_decoder(seed)


def engine(config: EngineConfig = ENGINE, steps: int = 3) -> InProcess:
    return in_process(decoder(), decoder(), config, SpeculationConfig(lookahead=3, budget=4), steps)


def output(sequence: Sequence) -> list[int]:
    return sequence.tokens[sequence.num_prompt :]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (request(()), "the prompt is empty"),
        (request((1,) * 64), r"the prompt has 64 tokens and engine\.max_model_len is 64"),
        (request((1, 96)), "token ids outside the vocabulary of 96 tokens"),
        (request((1, -1)), "token ids outside the vocabulary"),
        (request(PROMPT, max_tokens=0), "max_tokens must be at least 1, not 0"),
        (request(PROMPT, stop=("x", "")), "a stop string is empty"),
        (request(PROMPT, "beam"), "mode 'beam' is not served by this engine, which has ar, sd, ssd, sd-colocated"),
        (request(PROMPT, lookahead=4), r"between 0 and speculation\.lookahead = 3, not 4"),
        (request(PROMPT, lookahead=-1), "lookahead must be between 0"),
        (request(PROMPT, params=SamplingParams(temperature=-0.1)), "temperature must be between"),
        (request(PROMPT, params=SamplingParams(temperature=float("nan"))), "temperature must be between"),
        (request(PROMPT, params=SamplingParams(top_p=0.0)), "top_p must be above 0"),
        (request(PROMPT, params=SamplingParams(min_p=1.5)), "min_p must be between 0 and 1"),
        (request(PROMPT, params=SamplingParams(top_k=-2)), "top_k must be between 0 and"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_with_the_reason(asked: Request, message: str) -> None:
    process = engine()
    with pytest.raises(RequestError, match=message):
        process.engine.add(asked)
    assert not process.engine.has_work


def test_a_request_larger_than_the_pool_is_refused() -> None:
    process = engine(EngineConfig(max_model_len=64, block_size=4, num_blocks=5))
    with pytest.raises(RequestError, match="needs 6 KV blocks and the pool has 5"):
        process.engine.add(request(PROMPT, max_tokens=16))
    process.run([request(PROMPT, max_tokens=15)])
    process.assert_all_blocks_are_back()


@pytest.mark.parametrize("mode", ["ar", "sd", "sd-colocated", "ssd"])
@pytest.mark.parametrize("rounds", range(5))
def test_a_request_cancelled_at_any_time_frees_everything_on_both_sides(mode: str, rounds: int) -> None:
    process = engine()
    asked = request(tuple(range(10, 30)), mode, request_id="gone")  # three chunks of prompt
    cancelled = process.engine.add(asked)
    for _ in range(rounds):
        process.engine.step()
    process.engine.cancel([cancelled])
    assert cancelled.finish_reason == "abort"
    assert not process.engine.has_work
    process.assert_all_blocks_are_back()
    assert process.draft.drafter.num_sequences == process.colocated.num_sequences == 0


def test_cancelling_one_of_several_leaves_the_others_their_tokens() -> None:
    (alone,) = engine().run([request(PROMPT, max_tokens=30)])
    process = engine()
    stays = process.engine.add(request(PROMPT, max_tokens=30, request_id="stays"))
    goes = process.engine.add(request((9, 8, 7), max_tokens=30, request_id="goes"))
    waits = [process.engine.add(request((i, i), max_tokens=4, request_id=f"{i}")) for i in range(3)]
    for _ in range(3):
        process.engine.step()
    process.engine.cancel([goes, waits[2]])  # running; still waiting
    assert goes.finish_reason == "abort"
    while process.engine.has_work:
        process.engine.step()
    assert output(stays) == output(alone)
    assert [sequence.finish_reason for sequence in waits] == ["length", "length", "abort"]
    process.assert_all_blocks_are_back()


def test_requests_that_wait_hold_no_memory_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    process = engine()
    made: list[BlockTable] = []
    make = BlockTable.slots.func  # type: ignore[attr-defined]
    counted = functools.cached_property(lambda table: made.append(table) or make(table))
    counted.__set_name__(BlockTable, "slots")
    monkeypatch.setattr(BlockTable, "slots", counted)
    waiting = [process.engine.add(request(PROMPT, "ar", max_tokens=4, request_id=str(i))) for i in range(50)]
    assert not made
    process.engine.step()
    assert 0 < len(made) <= ENGINE.max_num_seqs
    while process.engine.has_work:
        process.engine.step()
    assert [sequence.num_output for sequence in waiting] == [4] * 50


def test_an_output_that_waits_holds_little_memory_however_long_its_prompt() -> None:
    process = engine(replace(ENGINE, max_model_len=20_000, num_blocks=5_000))
    named = tuple(range(96))
    params = SamplingParams(repetition_penalty=1.5, banned_tokens=named[50:], logit_bias=tuple((i, 1.0) for i in named))
    first = request(named * 200, "ar", params=params)
    tracemalloc.start()
    try:
        waiting = [process.engine.add(replace(first, index=index)) for index in range(100)]
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / len(waiting) < 10_000  # of a prompt of 19,200 tokens
    process.engine.step()
    assert [len(sequence.tokens) for sequence in waiting[:4]] == [19_200] * 3 + [0]
    assert [sequence.processors is None for sequence in waiting[:4]] == [False] * 3 + [True]
    process.engine.cancel(waiting)
    assert {sequence.num_output for sequence in waiting} == {0}
    process.assert_all_blocks_are_back()


def test_a_request_that_cannot_begin_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    process = engine()
    begin = Sequence.begin

    def refuse_one(sequence: Sequence, vocab_size: int) -> None:
        if sequence.request.request_id == "bad":
            raise MemoryError("no room")
        begin(sequence, vocab_size)

    monkeypatch.setattr(Sequence, "begin", refuse_one)
    bad, good = process.run([request(PROMPT, request_id=name, max_tokens=8) for name in ("bad", "good")])
    assert bad.failure == "admitting failed: MemoryError: no room"
    assert good.num_output == 8
    process.assert_all_blocks_are_back()


def test_cancelling_what_has_ended_is_nothing() -> None:
    process = engine()
    sequences = process.run([request(PROMPT, request_id="over", max_tokens=3)])
    process.engine.cancel(sequences)
    assert [sequence.finish_reason for sequence in sequences] == ["length"]
    process.assert_all_blocks_are_back()


def test_a_long_prompt_does_not_keep_others_from_decoding() -> None:
    process = engine()
    process.engine.add(request(PROMPT, "ar", max_tokens=50, request_id="talks"))
    process.engine.step()
    long = process.engine.add(request(tuple(range(60)), "ar", max_tokens=2, request_id="long"))
    steps = 0
    while not long.prefilled:
        progressed = process.engine.step()
        assert "talks" in [item.sequence.request.request_id for item in progressed]
        assert long.table.length <= ENGINE.prefill_chunk * (steps + 1)
        steps += 1
    assert steps == 8  # 60 tokens in chunks of 8


def test_decoding_does_not_keep_a_prompt_waiting() -> None:
    process = engine()
    for name in ("a", "b"):
        process.engine.add(request(PROMPT, max_tokens=50, request_id=name))
    process.engine.step()
    process.engine.step()
    late = process.engine.add(request(PROMPT, max_tokens=2, request_id="late"))
    process.engine.step()
    assert late.prefilled


def test_a_prompt_of_several_chunks_gives_what_one_chunk_gives() -> None:
    prompt = tuple(range(20, 50))
    found = []
    for chunk in (1, 7, 8, 30, 64):
        process = engine(EngineConfig(max_model_len=64, block_size=4, prefill_chunk=chunk))
        found += [output(sequence) for sequence in process.run([request(prompt, max_tokens=20)])]
    assert found == [found[0]] * 5


def test_more_requests_than_the_pool_holds_all_come_through() -> None:
    process = engine(EngineConfig(max_model_len=64, max_num_seqs=8, block_size=4, num_blocks=12))
    asked = [request((i, i + 1), max_tokens=14, request_id=f"{i}") for i in range(9)]
    sequences = [process.engine.add(one) for one in asked]
    most = 0
    while process.engine.has_work:
        process.engine.step()
        most = max(most, len(process.engine.scheduler.running))
    assert most == 3  # four blocks each
    assert [len(output(sequence)) for sequence in sequences] == [14] * 9
    process.assert_all_blocks_are_back()


def test_statistics_count_what_the_user_got() -> None:
    process = engine(steps=6)
    (sequence,) = process.run([request(PROMPT, max_tokens=40, request_id="x")])
    statistics = sequence.statistics()
    got = [token for delta in process.deltas["x"] for token in delta.token_ids]
    assert got == output(sequence)
    assert statistics.num_tokens == len(got) == 40
    assert statistics.num_accepted_tokens == sum(statistics.accepted_per_position) <= statistics.num_draft_tokens
    assert statistics.num_tokens == 1 + statistics.rounds + statistics.num_accepted_tokens
    assert statistics.rounds == statistics.verify_ms.count == statistics.wait_ms.count
    assert 0 < statistics.hits <= statistics.lookups <= statistics.rounds
    assert statistics.round_ms.count <= statistics.hits + 1  # the last round has nothing to look up
