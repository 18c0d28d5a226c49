"""Attacks on the front door over real sockets: what one client does costs that client, and no other."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil
import pytest

from ssd_runtime.comm.control.client_messages import Generate, GetStatus
from ssd_runtime.comm.control.codec import encode
from ssd_runtime.comm.control.draft_messages import Hello
from ssd_runtime.comm.control.messages import Message
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.comm.link.setup import LinkHost
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape, VocabularyDigest
from ssd_runtime.config import Config, EngineConfig
from ssd_runtime.engine.client import Client
from ssd_runtime.leader.acceptor import SPARE_BUILDS, DraftAcceptor, Terms
from ssd_runtime.leader.leader import Leader, Stop
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.engines import InProcess, in_process
from tests.hostile import endless
from tests.process.runs import eventually
from tests.process.streams import Streams, answer
from tests.tiny_models import tiny_decoder, write_hf

LENGTH = 40  # tokens of an honest answer
SOON_S = 30.0  # a loaded machine
VOCABULARY = VocabularyDigest.of(["a", "b"])


@dataclass
class Served:
    """An engine that serves at an address, and the right answer to an honest client."""

    process: InProcess
    address: str
    acceptor: DraftAcceptor
    plain: tuple[int, ...]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_model(write_hf(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def served(tokenizer: Tokenizer) -> Iterator[Served]:
    """A leader in a thread, with a place for one more draft."""
    target = tiny_decoder(1, vocab_size=300)
    process = in_process(target, target, EngineConfig(max_model_len=256, max_num_seqs=4))
    stop = Stop()
    terms = Terms("digest", VOCABULARY, FrameShape.of(4, 6, 8, 0), LinkTiming(build=1.0), range(2, 4))
    with ControlServer.bind("127.0.0.1", 0) as server, contextlib.closing(LinkHost("127.0.0.1")) as host:
        acceptor = DraftAcceptor(server, host, terms)
        leader = Leader(Config(), process.engine, tokenizer, server, process.link, acceptor, {}, stop, "key")
        thread = threading.Thread(target=leader.run, daemon=True)
        thread.start()
        try:
            with contextlib.closing(Client(server.address, SOON_S)) as client:
                plain = answer(client, "ar", LENGTH).tokens
            yield Served(process, server.address, acceptor, plain)
        finally:
            stop.reason = "the test is over"
            thread.join(SOON_S)
            acceptor.close("the test is over")
        assert not thread.is_alive()


@contextlib.contextmanager
def honest(served: Served) -> Iterator[Streams]:
    """A client beside the attack, whose answers are right and never stop for long."""
    with Streams(served.address, LENGTH) as streams:
        eventually(lambda: len(streams.answers) > 0 or streams.failure is not None, SOON_S, "an honest answer")
        yield streams
        before = len(streams.answers)
        eventually(lambda: len(streams.answers) > before + 1 or streams.failure is not None, SOON_S, "one afterwards")
    assert streams.failure is None
    assert {one.tokens for one in streams.answers} == {served.plain}
    assert max(one.longest_gap for one in streams.answers) < 1


ATTACKER = """
import sys, time, zmq
address, connections = sys.argv[1:]
messages = [bytes.fromhex(line) for line in sys.stdin]
context = zmq.Context()
sockets = [context.socket(zmq.DEALER) for _ in range(int(connections))]
for socket in sockets:
    socket.setsockopt(zmq.RCVHWM, 1)
    socket.setsockopt(zmq.RCVBUF, 4096)
    socket.setsockopt(zmq.RECONNECT_IVL, -1)
    socket.connect(address)
while True:
    for socket in sockets:
        for message in messages:
            socket.send(message)
"""


@contextlib.contextmanager
def attacker(served: Served, *messages: Message, connections: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """Sends these messages again and again, over connections in turns, and never reads an answer."""
    process = subprocess.Popen(
        [sys.executable, "-c", ATTACKER, served.address, str(connections)], stdin=subprocess.PIPE
    )
    try:
        assert process.stdin is not None
        with process.stdin as said:
            said.writelines(encode(message).hex().encode() + b"\n" for message in messages)
        yield process
    finally:
        process.kill()
        process.wait(10)


def test_a_client_that_never_reads_is_dropped_by_name_with_its_requests(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """What it may leave unread is bounded: in messages, each of which is."""
    endless = Generate("r" * 256, prompt="x", max_tokens=200, ignore_eos=True, logprobs=20)
    me, highest = psutil.Process(), 0
    with honest(served):
        before = me.memory_info().rss
        with attacker(served, endless, GetStatus()):

            def dropped() -> bool:
                nonlocal highest
                highest = max(highest, me.memory_info().rss)
                return "messages unread: dropped" in caplog.text

            eventually(dropped, SOON_S, "it is dropped")
            mine = lambda sequence: sequence.request.request_id == endless.request_id  # noqa: E731
            scheduler = served.process.engine.scheduler
            eventually(
                lambda: not any(map(mine, (*scheduler.running, *scheduler.waiting))), 5.0, "its requests are cancelled"
            )
    (line,) = [record.message for record in caplog.records if "unread" in record.message]
    assert line.startswith("127.0.0.1:")
    assert highest - before < 40 * 2**20


def test_a_flood_of_large_messages_is_cut_off_before_it_fills_the_memory(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ssd_runtime.comm.control.server.MOST_BEHIND", 16 * 2**20)
    me, highest = psutil.Process(), 0
    large = Generate("large", prompt="x" * 2**20, max_tokens=1)
    with honest(served):
        before = me.memory_info().rss
        with attacker(served, large):

            def dropped() -> bool:
                nonlocal highest
                highest = max(highest, me.memory_info().rss)
                return "MiB that could not be read: dropped" in caplog.text

            eventually(dropped, SOON_S, "it is dropped")
        eventually(lambda: me.memory_info().rss < before + 50 * 2**20, SOON_S, "the memory is given back")
    assert highest - before < 400 * 2**20


@pytest.mark.parametrize(("part", "connections"), [(0, 1), (2**20, 1), (2**16, 40)])
def test_a_message_whose_parts_never_end_ends_its_connection_before_it_fills_the_memory(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, part: int, connections: int
) -> None:
    """Of many connections together too: those that sent most are ended."""
    monkeypatch.setattr("ssd_runtime.comm.control.server.MOST_BEHIND", 16 * 2**20)
    me, highest = psutil.Process(), 0
    with honest(served):
        before, files = me.memory_info().rss, me.num_fds()
        with endless(served.address, part, connections):

            def dropped() -> bool:
                nonlocal highest
                highest = max(highest, me.memory_info().rss)
                return len(set(re.findall(r"(\S+) \(no message so far\) .* dropped", caplog.text))) == connections

            eventually(dropped, SOON_S, "all are dropped")
            eventually(lambda: me.num_fds() <= files, SOON_S, "their connections are closed")
        eventually(lambda: me.memory_info().rss < before + 50 * 2**20, SOON_S, "the memory is given back")
    assert highest - before < 800 * 2**20


HELLOS = {
    "one draft": [Hello(PROTOCOL_VERSION, "draft", 0, "digest", VOCABULARY, "one")],
    "many drafts": [Hello(PROTOCOL_VERSION, "draft", 0, "digest", VOCABULARY, str(i)) for i in range(300)],
    "unfit drafts": [Hello(PROTOCOL_VERSION, "draft", 0, "another", VOCABULARY, "one")],
}


@pytest.mark.parametrize("hellos", HELLOS.values(), ids=HELLOS)
def test_a_flood_of_hellos_holds_up_no_round_and_builds_a_bounded_number_of_links(
    served: Served, hellos: list[Message]
) -> None:
    with honest(served) as streams:
        me = psutil.Process()
        threads, files, most = me.num_threads(), me.num_fds(), 0
        with attacker(served, *hellos, connections=5):
            until, seen = time.monotonic() + 1.5, len(streams.answers)
            while time.monotonic() < until or len(streams.answers) < seen + 2:
                most = max(most, sum(thread.name.startswith("link-build") for thread in threading.enumerate()))
                assert me.num_threads() < threads + 50
                assert me.num_fds() < files + 100
                time.sleep(0.01)
    assert most <= 2 + SPARE_BUILDS
