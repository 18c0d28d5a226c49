"""Drafts that die, stop, lie, dawdle and come back while streams run: every token is right, and the hits return."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgpack
import pytest
import zmq

from ssd_runtime.comm.control.client_messages import Failed, Generate
from ssd_runtime.comm.control.messages import Message, Refused
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.link.endpoint import DraftLink
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import Overloaded, PeerLost, RequestError
from ssd_runtime.speculation.types import Branch, Outcome, OutcomeFrame, TreeFrame
from tests.hostile import HOSTILE
from tests.process.impostor import garbage, hello, impostor
from tests.process.runs import SSD, Run, error_line, eventually
from tests.process.streams import Streams, answer, asked
from tests.process.targets import (
    LENGTH,
    WAIT_S,
    Target,
    assert_all_right,
    lone_draft,
    lone_target,
    until_hits_are_back,
)

pytestmark = pytest.mark.process

QUEUED = 8  # requests that may wait


@pytest.fixture(scope="module")
def target(starting: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Target:
    """It serves at once, before any draft is there."""
    return lone_target(starting, tmp_path_factory.mktemp("models"), f"[serve]\nmax_queued_requests = {QUEUED}\n")


@pytest.fixture(scope="module")
def draft(target: Target, starting: Callable[..., Run]) -> Callable[[], Run]:
    """Start a group of one draft and wait until it is linked; it is ended by whoever starts the next."""
    return lambda: lone_draft(starting, target)


def test_a_draft_is_stopped_goes_on_is_killed_and_another_comes(target: Target, draft: Callable[[], Run]) -> None:
    with Streams(target.address, LENGTH) as streams:
        first = draft()
        assert first.until("linked: draft ") == "1"  # the target's number for it
        until_hits_are_back(streams, len(streams.answers))
        rank = first.rank(0)

        lost, linked = target.status().drafts_lost, target.status().drafts_linked
        rank.suspend()
        target.until("the stopped draft is lost", lambda status: status.drafts_lost > lost)
        rank.resume()
        target.until("it is linked again", lambda status: status.drafts_linked > linked)
        until_hits_are_back(streams, len(streams.answers))

        lost = target.status().drafts_lost
        rank.kill()
        target.until("the killed draft is lost", lambda status: status.drafts_lost > lost)
        assert first.exit_code(WAIT_S) == 1
        assert "the draft was killed by signal 9" in error_line(first.err)
        assert not target.run.ended

        second = draft()
        assert second.until("linked: draft ") == "1"
        until_hits_are_back(streams, len(streams.answers))
        second.process.terminate()
        target.until("nobody is left", lambda status: status.draft == "lost")
    assert second.exit_code(WAIT_S) == 0
    first.assert_nothing_is_left()
    second.assert_nothing_is_left()
    assert_all_right(streams, target)


# ---- drafts made of nothing but bad intentions -----------------------------------------------------------------------


@contextlib.contextmanager
def joined(target: Target) -> Iterator[DraftLink]:
    """A link to the target as a draft has it."""
    with impostor(target.address, target.config) as link:
        target.until("the impostor is linked", lambda status: status.draft == "linked")
        yield link


def frames(link: DraftLink) -> Iterator[OutcomeFrame]:
    """What the target asks, until it has had enough."""
    with contextlib.suppress(PeerLost):
        while True:
            yield from link.receive(0.2)


def test_a_draft_that_answers_garbage_is_lost_and_nobody_is_hurt(target: Target) -> None:
    lost = target.status().drafts_lost
    with Streams(target.address, LENGTH) as streams, joined(target) as link:
        garbage(link)
        target.until("it is lost", lambda status: status.drafts_lost > lost)
        eventually(lambda: len(streams.answers) > 1 or streams.failure is not None, WAIT_S, "answers")
    assert_all_right(streams, target)


def lies(frame: OutcomeFrame) -> TreeFrame:
    """A well-formed tree of wrong tokens, of tokens there are none, and of sequences there are none."""
    branches = []
    for row in frame.rows:
        for outcome in (row.outcome, Outcome(0, 5), Outcome(1, 7)):
            for turn in (row.turn - 1, row.turn, row.turn + 7):
                branches.append(Branch(row.sequence_id, turn, outcome, (1, 2**30, 3)))
        branches.append(Branch(row.sequence_id + 1000, row.turn, row.outcome, (1, 2)))
    return TreeFrame(frame.round, tuple(branches[:4]), 1, 1)


def test_a_draft_that_lies_is_not_believed(target: Target) -> None:
    with Streams(target.address, LENGTH) as streams, joined(target) as link:
        for told, frame in enumerate(frames(link)):
            link.send(lies(frame))
            if streams.failure or (told > 50 and len(streams.answers) > 1):
                break
    assert_all_right(streams, target)


def test_a_draft_that_says_nothing_is_not_waited_for(target: Target) -> None:
    """It reads, and its keepalives come: only an answer never does."""
    with Streams(target.address, LENGTH) as streams, joined(target) as link:
        for _ in frames(link):
            if streams.failure or len(streams.answers) > 2:
                break
        status = target.status()
        assert status.num_drafts == 1 or status.drafts_lost
    assert_all_right(streams, target)
    # Time asleep for the draft only: what a loaded machine adds to a gap is told apart.
    assert max(lap.awaited for stall in status.stalls for lap in stall.laps) < 500


# ---- the front door --------------------------------------------------------------------------------------------------


def test_a_flooded_control_socket_does_not_stop_the_streams(target: Target) -> None:
    over = threading.Event()

    def flood() -> None:
        context = zmq.Context()
        dealer = context.socket(zmq.DEALER)
        dealer.linger, dealer.sndhwm = 0, 100
        dealer.connect(target.address)
        while not over.is_set():
            with contextlib.suppress(zmq.Again):
                dealer.send(b"\xc1 nonsense", zmq.NOBLOCK)
            if dealer.poll(0):
                dealer.recv()
        dealer.close()
        context.term()

    thread = threading.Thread(target=flood, daemon=True)
    with Streams(target.address, LENGTH) as streams:
        thread.start()
        eventually(lambda: len(streams.answers) > 1 or streams.failure is not None, WAIT_S, "answers")
        over.set()
    thread.join(10)
    assert_all_right(streams, target)


def test_whatever_a_client_sends_is_refused_and_the_streams_go_on(target: Target) -> None:
    """Nested, absurd and dear messages, one after the other: each costs its sender, and nobody a second."""

    def told(*parts: bytes) -> Message:
        sender._socket.send_multipart(parts)
        return sender.wait_for(Failed, Refused, timeout_s=WAIT_S)

    plausible = {"request_id": "odd", "prompt": "x"}
    odd: list[dict[str, Any]] = [
        {"params": {"top_k": 2**63}},
        {"params": {"seed": -1}},
        {"params": {"logit_bias": [[token, 1.0] for token in range(4096)] * 2}},
        {"params": {"logit_bias": [[5, 1.0]] * 4096}},
        {"params": {"banned_tokens": [0] * 65_536, "allowed_tokens": [2**31 - 1] * 65_536}, "n": 128},
        {"prompt": None, "messages": [{"role": "x" * 5_000_000, "content": ""}]},
        {"prompt": None, "messages": [{"role": "", "content": ""}] * 60_000},
        {"prompt": None, "messages": [{"role": "user", "content": "a b "}] * 4096, "n": 128},
        {"prompt": "a" * 5_000_000},
        {"prompt": "a b " * 15_000, "n": 128},
        {"max_tokens": 2**63},
        {"stop": ["x" * 65_537]},
    ]
    with (
        Streams(target.address, LENGTH) as streams,
        contextlib.closing(ControlPeer.connect(target.address)) as sender,
    ):
        eventually(lambda: bool(streams.answers), WAIT_S, "an answer")
        for change in odd:
            data = msgpack.packb([PROTOCOL_VERSION, "Generate", plausible | change])
            answered = told(data)
            assert isinstance(answered, Failed), list(change)
            assert (answered.request_id, answered.kind) == ("odd", "request")
        for data in HOSTILE.values():
            assert isinstance(told(data), Failed | Refused)
        assert isinstance(told(*[b""] * 300_000), Refused)
        answers = len(streams.answers)
        eventually(lambda: len(streams.answers) > answers + 1 or streams.failure is not None, WAIT_S, "answers")
    assert_all_right(streams, target)


def test_a_flood_of_requests_is_refused_beyond_the_limit_and_hurts_nobody(target: Target) -> None:
    refused: list[Failed] = []
    over = threading.Event()

    def flood() -> None:
        with contextlib.closing(ControlPeer.connect(target.address)) as control:
            for number in itertools.takewhile(lambda _: not over.is_set(), itertools.count()):
                with contextlib.suppress(PeerLost):  # its own queue is full
                    control.send(Generate(f"flood-{number}", prompt="x", max_tokens=3000, ignore_eos=True))
                refused.extend(message for message in control.poll(0.0) if isinstance(message, Failed))

    thread = threading.Thread(target=flood, daemon=True)
    with contextlib.closing(Client(target.address, WAIT_S)) as client:

        def is_refused() -> bool:
            try:
                next(client.generate(asked("ar", 5)))
            except Overloaded as error:
                return f"serve.max_queued_requests is {QUEUED}: try again later" in str(error)
            return False

        try:
            assert answer(client, "ssd", LENGTH, on_first=thread.start).tokens == target.plain.tokens
            eventually(is_refused, WAIT_S, "one more is refused, too")
        finally:
            over.set()
            thread.join(10)
        assert {message.kind for message in refused} == {"busy"}
        target.until("who is gone is not served", lambda status: status.num_running == status.num_waiting == 0)
        assert answer(client, "ssd", LENGTH).tokens == target.plain.tokens


def test_a_mode_that_the_engine_was_not_started_for_is_refused_and_loads_nothing(target: Target) -> None:
    leader = target.run.rank(0)
    before = leader.memory_info().rss
    with contextlib.closing(Client(target.address, WAIT_S)) as client:
        for _ in range(3):
            with pytest.raises(RequestError, match=r"start the engine with speculation\.mode = sd-colocated"):
                list(client.generate(asked("sd-colocated", 5)))
        assert leader.memory_info().rss < before + 2**20
        assert answer(client, "ssd", LENGTH).tokens == target.plain.tokens


def test_a_draft_that_does_not_fit_is_refused_and_one_too_many_may_come_later(target: Target) -> None:
    with joined(target), contextlib.closing(ControlPeer.connect(target.address)) as control:
        control.send(hello(target.config, "x", "another"))
        refused = control.wait_for(Refused, timeout_s=WAIT_S)
        assert isinstance(refused, Refused)
        assert "configuration another of the draft" in refused.reason
        assert not refused.again
        control.send(hello(target.config, "x"))
        refused = control.wait_for(Refused, timeout_s=WAIT_S)
        assert refused == Refused("this engine has its draft already", again=True)


# ---- the target ------------------------------------------------------------------------------------------------------


def test_losing_the_target_fails_its_requests_at_once_and_its_draft_waits_for_another(
    target: Target, draft: Callable[[], Run], starting: Callable[..., Run]
) -> None:
    drafting = draft()
    port = target.address.rpartition(":")[2]
    with Streams(target.address, 3000) as streams:
        eventually(lambda: target.status().num_running > 0, WAIT_S, "a stream runs")
        target.run.rank(0).kill()
        eventually(lambda: streams.failure is not None, 10, "the client is told")
    assert "lost" in str(streams.failure)
    assert target.run.exit_code(WAIT_S) == 1
    target.run.assert_nothing_is_left()

    again = starting(*SSD, "up", "--role", "target", "--config", str(target.config), "--set", f"serve.port={port}")
    assert again.until("address: ") == target.address
    target.until("the draft has found the new target", lambda status: status.draft == "linked" or drafting.ended)
    assert not drafting.ended, drafting.err
    with contextlib.closing(Client(target.address, 20.0)) as client:
        assert answer(client, "ssd", LENGTH).tokens == target.plain.tokens
        client.shutdown()
    assert again.exit_code(WAIT_S) == 0
    assert drafting.exit_code(WAIT_S) == 0  # told to leave, not left behind
    again.assert_nothing_is_left()
    drafting.assert_nothing_is_left()


def test_a_draft_whose_target_never_comes_gives_up(target: Target, starting: Callable[..., Run]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        impatient = ["--set", "timeouts.load=1.0", "--set", "timeouts.handshake=1.0"]
        waiting = starting(
            *SSD, "up", "--role", "draft", "--target", address, "--config", str(target.config), *impatient
        )
        assert waiting.exit_code(WAIT_S) == 1
    assert "target rank 0 lost" in error_line(waiting.err)
    assert "no target within 2 s" in waiting.err
    waiting.assert_nothing_is_left()


def test_role_and_target_go_together(starting: Callable[..., Run]) -> None:
    for arguments in (["--role", "draft"], ["--role", "target", "--target", "127.0.0.1:1"]):
        wrong = starting(*SSD, "up", *arguments)
        assert wrong.exit_code(WAIT_S) == 2
        assert "--role draft needs --target HOST:PORT" in error_line(wrong.err)


def test_in_one_world_a_stopped_draft_is_done_without_until_it_goes_on(
    starting: Callable[..., Run], target: Target
) -> None:
    world = starting(*SSD, "up", "--config", str(target.config))
    address = world.until("address: ")
    with contextlib.closing(Client(address, 20.0)) as client:
        world.rank(1).suspend()
        assert answer(client, "ssd", LENGTH).tokens == target.plain.tokens
        eventually(lambda: client.status().draft == "lost", WAIT_S, "it is lost")
        world.rank(1).resume()
        eventually(lambda: client.status().draft == "linked", WAIT_S, "it is back")
        assert answer(client, "ssd", LENGTH).tokens == target.plain.tokens
        client.shutdown()
    assert world.exit_code(WAIT_S) == 0
    world.assert_nothing_is_left()
