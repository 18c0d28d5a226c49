"""The leader's requests of several outputs, over a played socket and a real engine of a tiny model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssd_runtime.comm.messages import Cancel, Chunk, Failed, Finished, Generate, Message
from ssd_runtime.config import Config, EngineConfig
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.tokenizer import Tokenizer
from ssd_runtime.speculation.types import SamplingParams
from ssd_runtime.target.leader import Leader, Stop
from tests.engines import InProcess, in_process
from tests.tiny_models import tiny_decoder, write_hf


class Socket:
    """Delivers what it is given, one batch a poll, and keeps what is sent."""

    def __init__(self, stop: Stop, process: InProcess) -> None:
        self._stop, self._process = stop, process
        self.arriving: list[list[Message]] = []
        self.sent: list[Message] = []
        self.client_is_there = True

    def poll(self, timeout_s: float) -> list[tuple[bytes, Message]]:
        if self.arriving:
            return [(b"client", message) for message in self.arriving.pop(0)]
        if not self._process.engine.has_work:
            self._stop.reason = "done"
        return []

    def send(self, identity: bytes, message: Message) -> bool:
        assert identity == b"client"
        self.sent.append(message)
        return self.client_is_there


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_model(write_hf(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(scope="module")
def models() -> tuple[Decoder, Decoder]:
    return tiny_decoder(1, vocab_size=300), tiny_decoder(1, vocab_size=300)


@pytest.fixture
def process(models: tuple[Decoder, Decoder]) -> InProcess:
    return in_process(*models, EngineConfig(max_model_len=64, max_num_seqs=2))


def serve(process: InProcess, tokenizer: Tokenizer, *batches: list[Message], gone: bool = False) -> list[Any]:
    stop = Stop()
    socket = Socket(stop, process)
    socket.arriving, socket.client_is_there = list(batches), not gone
    Leader(Config(), process.engine, tokenizer, socket, process.link, None, {}, stop).run()  # type: ignore[arg-type]
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


@pytest.mark.parametrize("stream", [True, False])
def test_output_i_is_what_seed_plus_i_gives_alone(process: InProcess, tokenizer: Tokenizer, stream: bool) -> None:
    *chunks, finished = serve(process, tokenizer, [replace(ASKED, n=5, stream=stream)])  # more than run at once
    assert isinstance(finished, Finished)
    assert finished.finish_reasons == ("length",) * 5
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (len(tokenizer.encode("the fox")), 60)
    assert finished.statistics.num_tokens == 60
    assert stream or len(chunks) == 5
    outputs = [tokens_of(chunks, index) for index in range(5)]
    assert len(set(outputs)) == 5
    for index, output in enumerate(outputs):
        alone = serve(process, tokenizer, [replace(ASKED, params=replace(ASKED.params, seed=5 + index), mode="ar")])
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
        ({"n": 0}, "n must be between 1 and 128, not 0"),
        ({"n": 129}, "not 129"),
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
