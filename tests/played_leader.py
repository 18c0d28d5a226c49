"""A leader over a played socket and a real engine of a tiny model; what its clients are sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from ssd_runtime.comm.control.client_messages import Chunk, Generate
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.config import Config, EngineConfig
from ssd_runtime.leader.leader import Leader, Stop
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


def serve(
    process: InProcess,
    tokenizer: Tokenizer,
    *batches: list[Message],
    gone: bool = False,
    was_there: bool = True,
    config: Config = Config(),  # noqa: B008 (frozen)
) -> list[Any]:
    """What is sent where there is one client, who is gone or not by the time it is looked for."""
    stop = Stop()
    socket = Socket(stop, process)
    socket.client_is_there, socket.client_was_there = not gone, was_there
    _run(socket, stop, process, tokenizer, batches, config)
    return socket.sent


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
    socket.local = set(local)
    _run(socket, stop, process, tokenizer, batches, config)
    return socket.sent_to, stop.reason


def _run(
    socket: Socket,
    stop: Stop,
    process: InProcess,
    tokenizer: Tokenizer,
    batches: Sequence[Sequence[Arrival]],
    config: Config,
) -> None:
    socket.arriving = [list(batch) for batch in batches]
    Leader(config, process.engine, tokenizer, socket, process.link, None, {}, stop, KEY).run()  # type: ignore[arg-type]
    process.assert_all_blocks_are_back()


ASKED = Generate(
    "r", prompt="the fox", params=SamplingParams(temperature=1.0, seed=5), max_tokens=12, ignore_eos=True, logprobs=1
)


def tokens_of(sent: list[Any], index: int = 0) -> tuple[int, ...]:
    chunks = [chunk for chunk in sent if isinstance(chunk, Chunk) and chunk.index == index]
    for chunk in chunks:
        assert [one.token for one in chunk.logprobs] == list(chunk.token_ids)
    return sum((chunk.token_ids for chunk in chunks), ())


@pytest.fixture(name="tokenizer", scope="module")
def tokenizer_fixture(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_model(write_hf(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture(name="models", scope="module")
def models_fixture() -> tuple[Decoder, Decoder]:
    return tiny_decoder(1, vocab_size=300), tiny_decoder(1, vocab_size=300)


@pytest.fixture(name="process")
def process_fixture(models: tuple[Decoder, Decoder]) -> InProcess:
    return in_process(*models, EngineConfig(max_model_len=64, max_num_seqs=2))


@pytest.fixture(name="plain")
def plain_fixture(process: InProcess, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The right answer."""
    return tokens_of(serve(process, tokenizer, [ASKED]))
