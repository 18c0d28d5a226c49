"""What the leader refuses or fails before it runs, and that no other request is touched by it."""

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

from ssd_runtime.comm.control.client_messages import ChatMessage, Chunk, Failed, Finished
from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.config import Config, EngineConfig, ServeConfig
from ssd_runtime.errors import RequestError
from ssd_runtime.leader.requests import RequestReader
from ssd_runtime.model.text.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from tests.engines import InProcess
from tests.played_leader import ASKED, models_fixture, process_fixture, serve, tokenizer_fixture, tokens_of  # noqa: F401
from tests.tiny_models import write_hf


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
    assert serve(process, tokenizer, [ASKED], gone=True, was_there=False) == []
    assert process.engine.scheduler.num_queued == 0
