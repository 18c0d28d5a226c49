"""What strangers and malicious clients and drafts do to an engine, one function each, as in faults.py."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Iterator

import msgpack
import zmq

from ssd_runtime.comm.control.client_messages import Cancel, Chunk, Failed, Finished, Generate, GetStatus
from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import MOST_STEP_ROWS, MOST_STEP_US, SamplingParams, TreeFrame
from tests.hostile import HOSTILE, endless
from tests.process.impostor import hello, impostor
from tests.soak.engine import Engine
from tests.soak.strangers import listening, visit

ANSWER_S = 20.0
HELLOS = 1500
VISITORS = 300  # at each port, who leave at once, and as many who say something first

REFUSED: tuple[dict[str, object], ...] = (  # fields beside the id, as a client without our checks would send them
    {"prompt": "x", "params": {"top_k": 2**63}},
    {"prompt": "x", "params": {"seed": -1}},
    {"prompt": "x", "params": {"repetition_penalty": 1e300}},
    {"prompt": "x", "params": {"logit_bias": [[1, 1.0]] * 10_000}},
    {"prompt": "x", "stop": ["x"] * 300},
    {"prompt": "x", "mode": "sd-colocated"},
    {"prompt": "x", "n": 2**40},
    {"prompt": "x" * 5 * 2**20},
    {"messages": [{"role": "r" * 10**6, "content": ""}]},
    {"messages": [{"role": "user", "content": ""}] * 50_000},
    {"token_ids": [2**31 - 1]},
    {"token_ids": []},
)


@contextlib.contextmanager
def dealer(engine: Engine) -> Iterator[zmq.Socket[bytes]]:
    """A client's socket without the client."""
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.linger = 0
    socket.connect(engine.address)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


def ask_what_is_refused(engine: Engine, chance: random.Random) -> None:
    """Each request fails by its id, and nothing else comes of it; one at an extreme that is allowed is answered."""
    extreme = SamplingParams(temperature=1e-38, top_p=1e-30, min_p=1.0, seed=2**64 - 1)
    with dealer(engine) as socket:
        failing = {f"refused-{i}" for i in range(len(REFUSED))}
        for name, fields in zip(sorted(failing), REFUSED, strict=True):
            socket.send(msgpack.packb([PROTOCOL_VERSION, "Generate", {"request_id": name, **fields}]))
        socket.send(encode(Generate("extreme", prompt="lazy dog", params=extreme, max_tokens=5)))
        awaited = failing | {"extreme"}
        while awaited:
            assert socket.poll(int(ANSWER_S * 1e3)), f"no answer for {awaited}"
            match decode(socket.recv()):
                case Failed(request_id, kind, reason) if kind != "busy":
                    assert request_id in failing, reason
                    awaited.discard(request_id)
                case Failed(request_id):  # a flood was just before
                    awaited.discard(request_id)
                case Finished(request_id) | Chunk(request_id):
                    assert request_id == "extreme"
                    awaited.discard(request_id)


def send_what_is_dear_to_read(engine: Engine, chance: random.Random) -> None:
    """A few messages of the largest size there is."""
    with dealer(engine) as socket:
        for name in chance.sample(sorted(HOSTILE), 3):
            socket.send(HOSTILE[name])
        engine.run_until(time.monotonic() + 1.0)


def never_end_a_message(engine: Engine, chance: random.Random) -> None:
    """Parts of any size, and never the last one."""
    with endless(engine.address, chance.choice((0, 100, 2**16)), connections=5):
        engine.run_until(time.monotonic() + 2.0)


def never_read(engine: Engine, chance: random.Random) -> None:
    """Ask for answers without end, and read none."""
    with dealer(engine) as socket:
        socket.setsockopt(zmq.RCVHWM, 1)
        question, until = encode(GetStatus()), time.monotonic() + 2.0
        while time.monotonic() < until:
            with contextlib.suppress(zmq.Again):
                socket.send(question, zmq.NOBLOCK)


def cancel_what_is_others(engine: Engine, chance: random.Random) -> None:
    """Ids of requests that run, or never did."""
    with contextlib.closing(ControlPeer.connect(engine.address)) as control:
        for name in engine.running_ids() + [f"never-{i}" for i in range(100)]:
            control.send(Cancel(name))
        control.send(GetStatus())
        control.poll(ANSWER_S)


def knock_without_end(engine: Engine, chance: random.Random) -> None:
    """As one draft or as many, which never come to their links."""
    said = hello(engine.config, "knocking")
    with contextlib.closing(ControlPeer.connect(engine.address)) as control:
        for number in range(HELLOS):
            instance = "knocking" if chance.random() < 0.5 else f"knocking-{number}"
            with contextlib.suppress(PeerLost):  # its own queue is full
                control.send(dataclasses.replace(said, instance=instance))
            if number % 100 == 0:
                control.poll(0.0)


def come_to_every_port(engine: Engine, chance: random.Random) -> None:
    """Of the leader and of its draft: come and leave; come, say something and leave."""
    processes = [engine.target.rank(0), engine.draft_rank()]
    for process in filter(None, processes):
        for (host, port), said in itertools.product(listening(process.pid), (b"", chance.randbytes(64))):
            visit(host, port, VISITORS, said)


def lie_about_time(engine: Engine, chance: random.Random) -> None:
    """A draft whose frames are well-formed, and whose steps take no time or an hour, for no row or millions."""
    engine.draft.kill()
    with impostor(engine.address, engine.config) as link, contextlib.suppress(PeerLost):
        for _ in range(200):
            microseconds, rows = (chance.choice((0, 1, most)) for most in (MOST_STEP_US, MOST_STEP_ROWS))
            link.send(TreeFrame(0, (), int(microseconds), int(rows)))
            link.receive()
            engine.run_until(time.monotonic() + 0.005)
    engine.new_draft()


ATTACKS: dict[str, Callable[[Engine, random.Random], None]] = {
    "ask what is refused": ask_what_is_refused,
    "send what is dear to read": send_what_is_dear_to_read,
    "never end a message": never_end_a_message,
    "never read": never_read,
    "cancel what is others'": cancel_what_is_others,
    "knock without end": knock_without_end,
    "come to every port": come_to_every_port,
    "lie about time": lie_about_time,
}
