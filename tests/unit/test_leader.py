"""The leader: requests of several outputs, whose they are, who may end the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ssd_runtime.comm.control.client_messages import Cancel, Chunk, Failed, Finished
from ssd_runtime.comm.control.codec import encode
from ssd_runtime.comm.control.messages import Message, Refused, Shutdown
from ssd_runtime.config import Config, Mode, ServeConfig
from ssd_runtime.engine.sequence import Samples
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess
from tests.played_leader import (  # noqa: F401
    ASKED,
    KEY,
    models_fixture,
    plain_fixture,
    process_fixture,
    serve,
    serve_clients,
    tokenizer_fixture,
    tokens_of,
)


@pytest.mark.parametrize(("mode", "stream"), [("ssd", True), ("ssd", False), ("sd", True), ("sd-colocated", True)])
def test_output_i_is_what_seed_plus_i_gives_alone(
    process: InProcess, tokenizer: Tokenizer, mode: Mode, stream: bool
) -> None:
    params = SamplingParams(temperature=1.0, seed=5, repetition_penalty=1.2, frequency_penalty=0.3)
    asked = replace(ASKED, params=params, mode=mode)
    *chunks, finished = serve(process, tokenizer, [replace(asked, n=5, stream=stream)])  # more than run at once
    assert isinstance(finished, Finished)
    assert finished.finish_reasons == ("length",) * 5
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (len(tokenizer.encode("the fox")), 60)
    assert finished.statistics.num_tokens == 60
    assert stream or len(chunks) == 5
    outputs = [tokens_of(chunks, index) for index in range(5)]
    assert len(set(outputs)) == 5
    for index, output in enumerate(outputs):
        alone = serve(process, tokenizer, [replace(asked, params=replace(params, seed=5 + index), mode="ar")])
        assert output == tokens_of(alone)


def test_outputs_end_each_for_its_own_reason(process: InProcess, tokenizer: Tokenizer) -> None:
    free = [tokens_of(serve(process, tokenizer, [replace(ASKED, n=2)]), index) for index in range(2)]
    word = tokenizer.decode(list(free[1][:3]))
    assert word not in tokenizer.decode(list(free[0]))
    *chunks, finished = serve(process, tokenizer, [replace(ASKED, n=2, stop=(word,))])
    assert finished.finish_reasons == ("length", "stop")
    assert tokens_of(chunks, 0) == free[0]
    assert tokens_of(chunks, 1) == free[1][:3]
    assert finished.usage.completion_tokens == 12 + 3


def test_cancelling_ends_all_outputs(process: InProcess, tokenizer: Tokenizer) -> None:
    sent = serve(process, tokenizer, [replace(ASKED, n=4, max_tokens=50)], [], [], [], [Cancel("r")])
    finished = sent[-1]
    assert finished.finish_reasons == ("abort",) * 4
    assert finished.usage.completion_tokens == sum(len(tokens_of(sent, index)) for index in range(4)) > 0


def test_a_client_that_is_gone_ends_all_outputs(process: InProcess, tokenizer: Tokenizer) -> None:
    sent = serve(process, tokenizer, [replace(ASKED, n=4, max_tokens=50)], gone=True)
    assert sum(isinstance(message, Chunk) for message in sent) <= 2
    assert not process.engine.has_work


def test_requests_that_wait_for_nobody_are_dropped(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that does not stream is sent nothing by which it would be noticed that it is gone."""
    monkeypatch.setattr("ssd_runtime.leader.leader.PULSE_S", 0.0)
    sent = serve(process, tokenizer, [replace(ASKED, stream=False, n=4, max_tokens=50)], gone=True)
    assert sent == []
    assert not process.engine.has_work


def test_messages_are_handled_for_a_moment_between_two_rounds(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many have come: here time is up after each, so a round follows each."""
    monkeypatch.setattr("ssd_runtime.leader.leader.MAIL_S", -1.0)
    turns: list[str] = []
    step = process.engine.step
    monkeypatch.setattr(process.engine, "step", lambda: turns.append("round") or step())
    add = process.engine.add
    monkeypatch.setattr(process.engine, "add", lambda *given: turns.append("request") or add(*given))
    serve(process, tokenizer, [replace(ASKED, request_id=str(i), max_tokens=2) for i in range(4)])
    assert turns[:8] == ["request", "round"] * 4


# ---- whose request it is ---------------------------------------------------------------------------------------------


def test_two_clients_may_use_one_id_at_once(process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...]) -> None:
    other = replace(ASKED, params=replace(ASKED.params, seed=6))
    sent, _ = serve_clients(process, tokenizer, [(b"A", ASKED), (b"B", other)])
    assert tokens_of(sent[b"A"]) == plain
    assert tokens_of(sent[b"B"]) == tokens_of(serve(process, tokenizer, [other])) != plain
    assert all(isinstance(messages[-1], Finished) for messages in sent.values())


def test_nobody_cancels_the_request_of_another(
    process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...]
) -> None:
    sent, _ = serve_clients(process, tokenizer, [(b"A", ASKED)], [], [(b"B", Cancel("r"))], [], [(b"B", Cancel("r"))])
    assert b"B" not in sent
    assert tokens_of(sent[b"A"]) == plain
    assert sent[b"A"][-1].finish_reasons == ("length",)


def test_ones_own_of_two_requests_with_one_id_is_cancelled(
    process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...]
) -> None:
    asked: list[tuple[bytes, Message]] = [(b"A", ASKED), (b"B", replace(ASKED, n=2, max_tokens=50))]
    sent, _ = serve_clients(process, tokenizer, asked, [], [(b"B", Cancel("r"))])
    assert tokens_of(sent[b"A"]) == plain
    assert sent[b"B"][-1].finish_reasons == ("abort", "abort")


def test_cancelling_what_is_over_or_never_was_is_harmless(
    process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...]
) -> None:
    short = replace(ASKED, request_id="short", max_tokens=1)
    cancels: list[Message] = [Cancel("short"), Cancel("never"), Cancel("short")]
    sent = serve(process, tokenizer, [ASKED, short, Cancel("never")], [], [], [], cancels)
    assert tokens_of([m for m in sent if isinstance(m, Chunk) and m.request_id == "r"]) == plain
    assert [message.request_id for message in sent if isinstance(message, Finished)] == ["short", "r"]


@pytest.mark.parametrize("rounds", [0, 1])
def test_an_id_in_use_is_refused_and_the_first_request_goes_on(
    process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...], rounds: int
) -> None:
    """`Failed` would tell the client that the first one had failed."""
    second = replace(ASKED, params=replace(ASKED.params, seed=99), n=2)
    batches: list[list[Message]] = [[ASKED], *[[]] * rounds, [second]] if rounds else [[ASKED, second]]
    sent = serve(process, tokenizer, *batches)
    assert [message for message in sent if isinstance(message, Refused)] == [
        Refused("the id of a request that still runs was given to another: r")
    ]
    assert not any(isinstance(message, Failed) for message in sent)
    assert tokens_of(sent) == plain
    assert sum(isinstance(message, Finished) for message in sent) == 1


def test_an_id_may_be_used_again_once_its_request_is_over(
    process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...]
) -> None:
    sent = serve(process, tokenizer, [replace(ASKED, max_tokens=1)], [], [], [], [ASKED])
    assert tokens_of(sent) == (plain[0], *plain)


def test_all_requests_of_a_client_that_is_gone_end_without_a_word_more(
    process: InProcess, tokenizer: Tokenizer
) -> None:
    asked = [replace(ASKED, request_id=str(i), n=3, max_tokens=50) for i in range(3)]
    sent = serve(process, tokenizer, asked, gone=True)
    assert len(sent) == 1  # by which it was noticed
    assert not process.engine.has_work


def test_what_a_client_that_does_not_stream_waits_for_comes_in_pieces_of_bounded_size(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, plain: tuple[int, ...]
) -> None:
    """So its outputs pile up neither here nor, should it not read them, in the socket."""
    monkeypatch.setattr("ssd_runtime.leader.leader.PIECE_BYTES", 150)
    sent = serve(process, tokenizer, [replace(ASKED, stream=False)])
    chunks = [message for message in sent if isinstance(message, Chunk)]
    assert 1 < len(chunks) < 12
    assert max(len(chunk.token_ids) for chunk in chunks) <= 150 // 56 + 7  # and what one round may add
    assert tokens_of(sent) == plain


@pytest.mark.parametrize(("samples", "most"), [(False, 4096), (True, 64 * 1024)])
def test_what_a_request_cost_is_told_in_bounded_size_however_long_it_took(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, samples: bool, most: int
) -> None:
    """Before, the timings of every round of every output went along, and beyond 16 MiB the client was lost."""
    append = Samples.append

    def as_in_many_rounds(self: Samples, value: float) -> None:
        for _ in range(500):
            append(self, value)

    monkeypatch.setattr(Samples, "append", as_in_many_rounds)
    *_, finished = serve(process, tokenizer, [replace(ASKED, n=5, samples=samples, mode="sd")])
    assert finished.statistics.verify_ms.count > 4000
    assert 0 < finished.statistics.verify_ms.p50 <= finished.statistics.verify_ms.most
    assert bool(finished.statistics.verify_ms.samples) == samples
    assert len(encode(finished)) < most


# ---- who may end the engine ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "local", "allowed"),
    [(Shutdown("x", KEY), False, False), (Shutdown("x"), True, False), (Shutdown("x"), False, True)],
)
def test_the_engine_is_ended_from_its_own_host_with_its_key_or_where_that_is_allowed(
    process: InProcess, tokenizer: Tokenizer, message: Shutdown, local: bool, allowed: bool
) -> None:
    config = Config(serve=ServeConfig(allow_shutdown=allowed))
    sent, reason = serve_clients(process, tokenizer, [(b"B", message)], local=(b"B",) * local, config=config)
    assert reason == "x"
    assert [answer.state for answer in sent[b"B"]] == ["stopping"]


@pytest.mark.parametrize("key", ["", "a guess", KEY[:-1], "\N{SNOWMAN}"])
def test_from_elsewhere_the_engine_is_not_ended(
    process: InProcess, tokenizer: Tokenizer, plain: tuple[int, ...], caplog: pytest.LogCaptureFixture, key: str
) -> None:
    sent, reason = serve_clients(process, tokenizer, [(b"A", ASKED)], [(b"B", Shutdown("x", key))], local=(b"A",))
    assert reason == "done"
    (answer,) = sent[b"B"]
    assert "serve.allow_shutdown = true" in answer.reason
    assert "refused to end the engine" in caplog.text
    assert tokens_of(sent[b"A"]) == plain
