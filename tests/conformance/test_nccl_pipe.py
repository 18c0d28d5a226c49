"""What the NCCL pipe promises of a GPU it has to itself only now and then. Gloo and a thread stand in for both."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ssd_runtime.comm.link import gpu_queue
from ssd_runtime.comm.link.endpoint import GlooPipe
from ssd_runtime.comm.link.gpu_queue import GpuQueue
from ssd_runtime.comm.link.groups import gloo_group
from ssd_runtime.comm.link.nccl_pipe import READY, NcclPipe
from ssd_runtime.comm.link.setup import LinkHost, open_draft_link
from ssd_runtime.errors import PeerLost
from tests.conformance.links import BRISK, SHAPE, SOON, make_threads, outcomes, tree
from tests.conformance.nccl_stand_in import OVER_NCCL, HostQueue, StandInGroup, stand_in

WORDS, HEAD = 40, 7
PROMPT = 5.0  # seconds: what happens at once has happened, and what waits for SOON has not


@dataclass
class End:
    """One end of a direction, and what it works with."""

    pipe: NcclPipe
    group: StandInGroup
    gpu: HostQueue
    gloo: GlooPipe


def end(store: Any, rank: int, silence_s: float) -> End:
    gloo = GlooPipe(gloo_group(dist.PrefixStore("gloo", store), rank, "127.0.0.1", timedelta(seconds=SOON)), 1 - rank)
    group = StandInGroup(dist.PrefixStore("nccl", store), rank, None, timedelta(seconds=SOON))
    gpu: Any = HostQueue()
    return End(NcclPipe(gloo, group, 1 - rank, gpu, WORDS, HEAD, silence_s), group, gpu, gloo)


@pytest.fixture
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[End, End]]:
    """Sender and receiver, warmed up; the parameter is the receiver's silence. However they end, that is quick."""
    store, silence_s = dist.HashStore(), getattr(request, "param", SOON)
    with ThreadPoolExecutor(2) as both:
        sender, receiver = both.map(lambda rank: end(store, rank, silence_s), (0, 1))
        list(both.map(lambda one: one.pipe.warm_up(one is sender, SOON), (sender, receiver)))
        yield sender, receiver
        start = time.monotonic()
        for one in (sender, receiver):
            one.pipe.cancel()
            one.gpu.release()
            one.pipe.close()
    assert time.monotonic() - start < PROMPT
    assert not any(thread.name == "link-listen" for thread in threading.enumerate())


def frame(number: int, bare: bool = False) -> Tensor:
    words = torch.full((WORDS,), number)
    words[HEAD:] *= not bare
    return words


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def raises_promptly(use: Callable[[], object]) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError):
        use()
    assert time.monotonic() - start < PROMPT


def test_no_receive_is_posted_before_its_words_are_announced(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    idle = list(receiver.group.posted)
    assert idle == ["recv"]  # the first frame's, which warmed up
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(receiver.pipe.receive, WORDS, SOON)
        sender.pipe.finish(sender.pipe.post(frame(3, bare=True)), SOON)
        assert torch.equal(reading.result(SOON), frame(3, bare=True))
    assert receiver.group.posted == idle
    assert sender.group.posted == ["send"]
    sender.gpu.hold()  # announced, and not sent
    in_flight = sender.pipe.post(frame(4))
    until(lambda: receiver.group.posted == ["recv", "recv"])
    sender.gpu.release()
    assert torch.equal(receiver.pipe.receive(WORDS, SOON), frame(4))
    sender.pipe.finish(in_flight, SOON)


def test_frames_arrive_whole_and_in_order_however_busy_the_gpus_are(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    order, in_flight = random.Random(7), []
    frames = [frame(number, bare=order.random() < 0.3) for number in range(1, 300)]
    with ThreadPoolExecutor(1) as reader:
        reading = reader.submit(lambda: [receiver.pipe.receive(WORDS, SOON) for _ in frames])
        for words in frames:
            busy = order.choice([sender, receiver, None, None])
            if busy is not None:
                busy.gpu.hold()
            in_flight.append(sender.pipe.post(words))
            if len(in_flight) == READY:
                sender.gpu.release()
                receiver.gpu.release()
                sender.pipe.finish(in_flight.pop(0), SOON)
        sender.gpu.release()
        receiver.gpu.release()
        arrived = reading.result(SOON)
    assert torch.equal(torch.stack(arrived), torch.stack(frames))


@pytest.mark.parametrize("ends", [0.3], indirect=True)
def test_words_that_were_announced_and_do_not_come_end_the_pipe_at_its_deadline(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.gpu.hold()
    in_flight = sender.pipe.post(frame(1))
    raises_promptly(lambda: receiver.pipe.receive(WORDS, 0.3))
    assert receiver.group.posted[-1] == "abort"
    raises_promptly(lambda: receiver.pipe.receive(WORDS, 0.1))
    del in_flight  # Gloo drops a send whose work and words are gone before it left


def test_words_that_nobody_takes_end_the_pipe_at_the_senders_deadline(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    receiver.gpu.hold()
    in_flight = sender.pipe.post(frame(1))
    raises_promptly(lambda: sender.pipe.finish(in_flight, 0.2))
    assert sender.group.posted[-1] == "abort"


@pytest.mark.parametrize("waits", ["sender", "receiver"])
def test_a_peer_that_dies_with_words_on_their_way_is_noticed_at_once(ends: tuple[End, End], waits: str) -> None:
    sender, receiver = ends
    waiting, dying = (sender, receiver) if waits == "sender" else (receiver, sender)
    dying.gpu.hold()
    in_flight = sender.pipe.post(frame(1))
    with ThreadPoolExecutor(1) as waiter:
        if waits == "sender":
            waited = waiter.submit(sender.pipe.finish, in_flight, SOON)
        else:
            waited = waiter.submit(receiver.pipe.receive, WORDS, SOON)  # type: ignore[arg-type]
            until(lambda: receiver.group.posted[-1] == "recv" and len(receiver.group.posted) == 2)
        dying.gloo.cancel()  # the connection is reset
        raises_promptly(lambda: waited.result(SOON))
    assert waiting.group.posted[-1] == "abort"


def test_a_cancel_ends_whoever_waits_for_words(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.gpu.hold()
    in_flight = sender.pipe.post(frame(1))
    with ThreadPoolExecutor(1) as waiter:
        waited = waiter.submit(receiver.pipe.receive, WORDS, SOON)
        until(lambda: len(receiver.group.posted) == 2)
        receiver.pipe.cancel()
        raises_promptly(lambda: waited.result(SOON))
    del in_flight


def test_words_that_have_come_are_handed_over_though_their_sender_is_gone_by_then(
    ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(words: Tensor) -> None:
        raise RuntimeError("connection reset")

    sender, receiver = ends
    monkeypatch.setattr(receiver.gloo, "post", gone)
    in_flight = sender.pipe.post(frame(1))
    assert torch.equal(receiver.pipe.receive(WORDS, SOON), frame(1))
    del in_flight


def test_a_flood_of_announcements_posts_a_few_receives_at_a_time(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.gpu.hold()
    in_flight = [sender.pipe.post(frame(number)) for number in range(1, 4 * READY)]
    until(lambda: receiver.gpu.carried == 1 + READY)  # with the one that warmed up
    sender.gpu.release()
    with ThreadPoolExecutor(1) as finisher:
        finished = finisher.map(lambda one: sender.pipe.finish(one, SOON), in_flight)
        for number in range(1, 4 * READY):
            assert receiver.gpu.carried - number <= READY
            assert torch.equal(receiver.pipe.receive(WORDS, SOON), frame(number))
        list(finished)


def test_a_flood_does_not_hold_up_whoever_gives_up(ends: tuple[End, End]) -> None:
    sender, receiver = ends
    sender.gpu.hold()
    in_flight = [sender.pipe.post(frame(number)) for number in range(1, 4 * READY)]
    until(lambda: receiver.gpu.carried == 1 + READY)
    listener = receiver.pipe._listener
    assert listener is not None
    receiver.pipe.cancel()
    listener.join(PROMPT)
    assert not listener.is_alive()
    del in_flight


# ---- in a link -------------------------------------------------------------------------------------------------------


def test_pushing_trees_never_waits_for_a_busy_gpu_and_only_the_newest_of_those_that_waited_arrives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in(monkeypatch.setattr)
    for pair in make_threads(**OVER_NCCL):
        endpoint: Any = pair.draft
        endpoint._sending._gpu.hold()
        took = []
        for tens in range(5):
            start = time.monotonic()
            for round in range(10 * tens, 10 * tens + 10):
                pair.draft.send(tree(round))
            took.append(time.monotonic() - start)
        assert min(took) < BRISK.silence / 2  # a busy machine may have paused one of them
        endpoint._sending._gpu.release()
        found = [pair.target.receive(SOON)[-1].round]
        while found[-1] < 49:
            found += [one.round for one in pair.target.receive(SOON)]
        assert len(found) < 20
        pair.target.send(outcomes(3))  # the other direction has a queue of its own
        assert pair.draft.receive(SOON) == [outcomes(3)]


def test_a_link_that_fails_to_be_built_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch.setattr)
    warm_up, warmed = NcclPipe.warm_up, []

    def fails_the_second_time(pipe: NcclPipe, sends: bool, timeout_s: float) -> None:
        warm_up(pipe, sends, timeout_s)
        warmed.append(pipe)
        if len(warmed) > 2:  # both ends of the first direction stand
            raise RuntimeError("no")

    monkeypatch.setattr(NcclPipe, "warm_up", fails_the_second_time)
    host = LinkHost("127.0.0.1")
    address = host.next_address(SHAPE)
    with ThreadPoolExecutor(1) as draft:
        opened = draft.submit(open_draft_link, address, BRISK, **OVER_NCCL)
        for build in (lambda: host.open(address, BRISK, **OVER_NCCL), lambda: opened.result(SOON)):
            with pytest.raises(PeerLost):
                build()
    host.close()
    until(lambda: not any(thread.name == "link-listen" for thread in threading.enumerate()))


# ---- the queue of a real GPU -----------------------------------------------------------------------------------------


def test_all_that_is_queued_on_a_gpu_is_on_a_stream_of_its_own_and_waited_for_without_spinning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as a CPU shows it: which calls torch gets, within which stream."""
    current: list[object] = []
    asked: list[dict[str, Any]] = []

    class Recorded:
        def record(self, stream: object) -> None:
            assert stream == "own"

        def copy_(self, source: object, non_blocking: bool) -> None:
            assert current == ["own"]
            assert non_blocking

        def wait(self) -> None:
            assert current == ["own"]

    @contextlib.contextmanager
    def within(stream: object) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def make(*sizes: object, **how: Any) -> Any:
        assert current == ["own"]
        asked.append(how)
        return Recorded()

    def stream(device: object, priority: int) -> str:
        assert priority < 0
        return "own"

    cuda = SimpleNamespace(Stream=stream, stream=within, Event=make)
    monkeypatch.setattr(gpu_queue, "torch", SimpleNamespace(cuda=cuda, empty=make, int64=torch.int64))
    gpu = GpuQueue(torch.device("cuda", 1))
    buffers = gpu.buffers(9)
    assert [one.get("pin_memory") for one in asked] == [True, None, None]
    assert asked[1]["device"] == torch.device("cuda", 1)
    assert asked[2] == {"blocking": True}
    gpu.copy(buffers.host, buffers.device)
    gpu.carry(Recorded)
    gpu.mark(buffers.landed)
    assert not current
