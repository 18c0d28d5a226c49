"""The leader: requests of several outputs, whose they are, over a played socket and a real engine of a tiny model."""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.client_messages import Cancel, ChatMessage, Chunk, Failed, Finished, Generate
from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.messages import Message, Refused, Shutdown
from ssd_runtime.config import Config, EngineConfig, Mode, ServeConfig
from ssd_runtime.errors import RequestError
from ssd_runtime.leader.leader import Leader, Stop
from ssd_runtime.leader.requests import RequestReader
from ssd_runtime.metrics import Samples
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess, in_process
from tests.tiny_models import tiny_decoder, write_hf

KEY = "the engine's key"
Arrival = Message | tuple[bytes, Message]  # of the one client, or of a named one


class Socket:
    """Delivers what it is given, one batch a poll, and keeps what is sent."""

    def __init__(self, stop: Stop, process: InProcess) -> None:
        self._stop, self._process = stop, process
        self.arriving: list[list[Arrival]] = []
        self.sent: list[Message] = []
        self.sent_to: dict[bytes, list[Any]] = {}
        self.local: set[bytes] = set()
        self.client_is_there = True
        self.client_was_there = True

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        if self.arriving:
            return [one if isinstance(one, tuple) else (b"client", one) for one in self.arriving.pop(0)]
        if not self._process.engine.has_work:
            self._stop.reason = "done"
        return []

    def send(self, identity: bytes, message: Message) -> bool:
        self.sent.append(message)
        self.sent_to.setdefault(identity, []).append(message)
        return self.client_is_there

    def alive(self, identity: bytes) -> bool:
        """One that leaves is there when it is looked for first."""
        was, self.client_was_there = self.client_was_there, self.client_is_there
        return was

    def is_local(self, identity: bytes) -> bool:
        return identity in self.local


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_model(write_hf(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, Decoder]:
    return tiny_decoder(1, vocab_size=300), tiny_decoder(1, vocab_size=300)


@pytest.fixture
def process(models: tuple[Decoder, Decoder]) -> InProcess:
    return in_process(*models, EngineConfig(max_model_len=64, max_num_seqs=2))


def serve(
    process: InProcess,
    tokenizer: Tokenizer,
    *batches: list[Message],
    gone: bool = False,
    config: Config = Config(),  # noqa: B008 (frozen)
) -> list[Any]:
    stop = Stop()
    socket = Socket(stop, process)
    socket.arriving, socket.client_is_there = [list(batch) for batch in batches], not gone
    Leader(config, process.engine, tokenizer, socket, process.link, None, {}, stop, KEY).run()  # type: ignore[arg-type]
    process.assert_all_blocks_are_back()
    return socket.sent


ASKED = Generate(
    "r", prompt="the fox", params=SamplingParams(temperature=1.0, seed=5), max_tokens=12, ignore_eos=True, logprobs=1
)


def tokens_of(sent: list[Any], index: int = 0) -> tuple[int, ...]:
    chunks = [chunk for chunk in sent if isinstance(chunk, Chunk) and chunk.index == index]
    for chunk in chunks:
        assert [one.token for one in chunk.logprobs] == list(chunk.token_ids)
    return sum((chunk.token_ids for chunk in chunks), ())


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


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 3, "logprobs": 21}, "logprobs must be"),
        ({"n": 3, "params": SamplingParams(banned_tokens=(300,))}, "outside the vocabulary of 300"),
    ],
)
def test_a_request_is_refused_whole(
    process: InProcess, tokenizer: Tokenizer, changes: dict[str, Any], reason: str
) -> None:
    (failed,) = serve(process, tokenizer, [replace(ASKED, **changes)])
    assert isinstance(failed, Failed)
    assert failed.kind == "request"
    assert reason in failed.reason


def test_more_than_may_wait_are_refused_at_once_and_no_other_is_touched(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssd_runtime.leader.leader.MAIL_S", 60.0)  # all of them before the first round
    limit = Config(serve=ServeConfig(max_queued_requests=3))
    flood: list[Message] = [replace(ASKED, request_id=str(i)) for i in range(9)]  # two run, three wait
    sent = serve(process, tokenizer, flood, config=limit)
    refused = [message for message in sent if isinstance(message, Failed)]
    assert [message.request_id for message in refused] == ["5", "6", "7", "8"]
    assert {(message.kind, message.reason) for message in refused} == {
        ("busy", "3 requests are waiting and serve.max_queued_requests is 3: try again later, or raise the limit")
    }
    (plain,) = {tokens_of(serve(process, tokenizer, [ASKED]))}
    for served in "01234":
        assert tokens_of([m for m in sent if isinstance(m, Chunk) and m.request_id == served]) == plain
    assert sum(isinstance(message, Finished) for message in sent) == 5


@pytest.mark.parametrize("n", [1, 2])
def test_more_tokens_than_may_wait_are_refused_at_once(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Whatever they stand for; outputs of one request share them."""
    monkeypatch.setattr("ssd_runtime.leader.leader.MAIL_S", 60.0)  # all of them before the first round
    monkeypatch.setattr("ssd_runtime.leader.leader.MOST_TOKENS_WAITING", 30)
    costly = replace(ASKED, n=n, params=SamplingParams(banned_tokens=tuple(range(9)), logit_bias=((250, 1.0),)))
    length = len(tokenizer.encode("the fox")) + 10
    taken = 30 // length + 1
    sent = serve(process, tokenizer, [replace(costly, request_id=str(i)) for i in range(taken + 2)])
    refused = [message for message in sent if isinstance(message, Failed)]
    assert [message.request_id for message in refused] == [str(taken), str(taken + 1)]
    reason = f"the requests that wait have {length * taken} tokens together: try again later"
    assert {(message.kind, message.reason) for message in refused} == {("busy", reason)}
    assert sum(isinstance(message, Finished) for message in sent) == taken


def test_a_request_of_many_outputs_is_taken_whole_or_not_at_all(process: InProcess, tokenizer: Tokenizer) -> None:
    limit = Config(serve=ServeConfig(max_queued_requests=1))
    *_, finished = serve(process, tokenizer, [replace(ASKED, n=7), replace(ASKED, request_id="late")], config=limit)
    assert finished.finish_reasons == ("length",) * 7


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


@pytest.mark.parametrize("text", ["prompt", "messages"])
def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenized(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(tokenizer, "encode", lambda *given, **named: pytest.fail("tokenized"))
    length = 64 * tokenizer.longest_token + 1
    messages = (ChatMessage("user", "x" * (length - 5)), ChatMessage("u", ""))
    given = {"prompt": "x" * length} if text == "prompt" else {"messages": messages}
    config = Config(engine=EngineConfig(max_model_len=64))
    (failed,) = serve(process, tokenizer, [replace(ASKED, **({"prompt": None} | given))], config=config)
    assert failed.kind == "request"
    assert f"the prompt has {length} characters, more than engine.max_model_len = 64 tokens can hold" in failed.reason


@pytest.mark.parametrize(
    ("stop", "reason"),
    [
        (("x",) * 17, "17 stop strings are given and serve.max_stop_strings is 16"),
        (("x" * 1025,), "a stop string is longer than serve.max_stop_bytes = 1024"),
    ],
)
def test_more_stop_strings_than_are_allowed_are_refused_before_any_work(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, stop: tuple[str, ...], reason: str
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "encode", lambda *given, **named: pytest.fail("tokenized"))
        (failed,) = serve(process, tokenizer, [replace(ASKED, stop=stop)])
    assert failed.kind == "request"
    assert reason in failed.reason
    wider = Config(serve=ServeConfig(max_stop_strings=17, max_stop_bytes=1025))
    *_, finished = serve(process, tokenizer, [replace(ASKED, stop=stop)], config=wider)
    assert isinstance(finished, Finished)


TEMPLATES = {
    "does not parse": "{% for",
    "fails": "{{ messages[0].content + 1 }}",
    "recursive": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "huge": "{{ 'x' * 99999999999 }}",
    "no text": "\ud800",
    "too long": "{{ 'x ' * 999 }}",
    "nothing": "",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_fails_is_the_failure_of_its_request_alone(
    process: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("ssd_runtime.model.text.chat_template.MOST_SECONDS", 0.05)
    path = write_hf(tmp_path / "tiny")
    (tmp_path / "tiny" / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES[name]}))
    tokenizer = Tokenizer.from_model(path)
    honest = replace(ASKED, request_id="honest")
    chat = replace(ASKED, prompt=None, messages=(ChatMessage("user", "hi"),))
    sent = serve(
        process, tokenizer, [honest, chat, replace(chat, request_id="again")], [replace(ASKED, request_id="late")]
    )
    failed = [message for message in sent if isinstance(message, Failed)]
    assert [(message.request_id, message.kind) for message in failed] == [("r", "request"), ("again", "request")]
    assert all(message.reason and "\n" not in message.reason for message in failed)
    alone = tokens_of(serve(process, tokenizer, [ASKED]))
    for request_id in ("honest", "late"):
        assert tokens_of([m for m in sent if isinstance(m, Chunk) and m.request_id == request_id]) == alone


@pytest.mark.parametrize("where", ["encode", "third add"])
@pytest.mark.parametrize("error", [ValueError("what\nis it"), RecursionError(), MemoryError(), OverflowError("x")])
def test_whatever_is_raised_before_a_request_runs_is_its_failure(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    plain = tokens_of(serve(process, tokenizer, [ASKED]))
    add, added = process.engine.add, itertools.count(1)

    def raising(*given: Any, **named: Any) -> Any:
        raise error

    def third_raising(*given: Any) -> Any:
        return raising() if next(added) == 3 else add(*given)

    with monkeypatch.context() as patched:
        if where == "encode":
            patched.setattr(tokenizer, "encode", raising)
        else:
            patched.setattr(process.engine, "add", third_raising)
        (failed,) = serve(process, tokenizer, [replace(ASKED, n=4)])
    assert (failed.request_id, failed.kind) == ("r", "engine")
    assert failed.reason.startswith("the request could not be begun: ")
    assert "\n" not in failed.reason
    assert not process.engine.has_work  # nothing of it is left behind
    assert tokens_of(serve(process, tokenizer, [ASKED])) == plain


TEXTS = st.text(max_size=20) | st.sampled_from(["\ud800", "a\udfffb", "\udc00\ud800"])  # halves of surrogate pairs


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(TEXTS, max_size=4), stop=st.lists(TEXTS, max_size=3).map(tuple))
def test_any_text_is_read_or_refused(tokenizer: Tokenizer, texts: list[str], stop: tuple[str, ...]) -> None:
    messages = tuple(ChatMessage(text, text) for text in texts)
    for given_text in ({"prompt": "".join(texts)}, {"prompt": None, "messages": messages}):
        asked = replace(ASKED, stop=stop, **given_text)  # type: ignore[arg-type]
        with contextlib.suppress(RequestError):
            assert RequestReader(Config(), tokenizer).read(asked)


def test_a_text_of_too_many_tokens_is_refused_by_its_beginning(
    process: InProcess, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, tokenized = tokenizer.encode, []
    monkeypatch.setattr(tokenizer, "encode", lambda text, **named: tokenized.append(len(text)) or encode(text, **named))
    text = "x y z w " * (64 * min(16, tokenizer.longest_token) // 8)
    assert len(encode(text)) > 3 * 64
    (failed,) = serve(
        process, tokenizer, [replace(ASKED, prompt=text)], config=Config(engine=EngineConfig(max_model_len=64))
    )
    assert failed.kind == "request"
    assert "of the prompt have" in failed.reason
    assert sum(tokenized) < len(text)


@pytest.mark.parametrize("text", ["fox", "the quick brown fox jumps over the lazy dog " * 3])
def test_a_text_that_fits_is_tokenized_whole(process: InProcess, tokenizer: Tokenizer, text: str) -> None:
    config = Config(engine=EngineConfig(max_model_len=len(tokenizer.encode(text)) + 1))
    assert len(text) > config.engine.max_model_len or text == "fox"
    (request,) = RequestReader(config, tokenizer).read(replace(ASKED, prompt=text))
    assert request.prompt_tokens == tuple(tokenizer.encode(text))


def test_the_dearest_request_that_may_come_is_taken_in_at_once(process: InProcess, tokenizer: Tokenizer) -> None:
    """Whatever a client asks for within all bounds, an honest client's stream goes on within a second."""
    params = SamplingParams(
        repetition_penalty=1.1,
        frequency_penalty=0.1,
        logit_bias=tuple((token, 1.0) for token in range(300)) * 13 + tuple((token, 1.0) for token in range(196)),
        banned_tokens=tuple(range(150)) * 436,
        allowed_tokens=tuple(range(150, 300)) * 436,
        min_tokens=1,
    )
    twice = replace(ASKED, n=128, params=params, logprobs=20, stop=("x" * 1024,) * 16)
    once = replace(twice, params=replace(params, logit_bias=tuple((token, 1.0) for token in range(300))))
    begin = time.thread_time()
    (failed,) = serve(process, tokenizer, [decode(encode(replace(twice, request_id="twice")))])
    assert "logit_bias names token 0 twice" in failed.reason
    reader, engine = RequestReader(Config(engine=EngineConfig(max_model_len=64)), tokenizer), process.engine
    sequences = [engine.add(request) for request in reader.read(decode(encode(once)))]  # type: ignore[arg-type]
    assert time.thread_time() - begin < 1.0
    engine.cancel(sequences)
    assert len(sequences) == 128


def test_a_request_whose_sender_has_left_is_not_begun(process: InProcess, tokenizer: Tokenizer) -> None:
    stop = Stop()
    socket = Socket(stop, process)
    socket.arriving, socket.client_is_there, socket.client_was_there = [[ASKED]], False, False
    Leader(Config(), process.engine, tokenizer, socket, process.link, None, {}, stop, KEY).run()  # type: ignore[arg-type]
    assert socket.sent == []
    assert process.engine.scheduler.num_queued == 0


# ---- whose request it is ---------------------------------------------------------------------------------------------


def serve_clients(
    process: InProcess,
    tokenizer: Tokenizer,
    *batches: list[tuple[bytes, Message]],
    local: tuple[bytes, ...] = (),
    config: Config = Config(),  # noqa: B008 (frozen)
) -> tuple[dict[bytes, list[Any]], str]:
    """What each client was sent, and why the leader left."""
    stop = Stop()
    socket = Socket(stop, process)
    socket.arriving, socket.local = [list(batch) for batch in batches], set(local)
    Leader(config, process.engine, tokenizer, socket, process.link, None, {}, stop, KEY).run()  # type: ignore[arg-type]
    process.assert_all_blocks_are_back()
    return socket.sent_to, stop.reason


@pytest.fixture
def plain(process: InProcess, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The right answer."""
    return tokens_of(serve(process, tokenizer, [ASKED]))


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
