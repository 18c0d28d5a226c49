"""What can happen to an engine, one function each; all they need of chance comes from the generator handed in."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from collections.abc import Callable

import zmq

from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import Overloaded, PeerLost
from tests.process.impostor import garbage, impostor
from tests.soak.engine import Engine

MOST_STOPPED_S = 5.0


def kill_the_draft(engine: Engine, chance: random.Random) -> None:
    """Its torchrun ends with it; another group is started after a while."""
    if rank := engine.draft_rank():
        rank.kill()
        engine.draft.exit_code(60)
    else:  # not up yet; it must not come beside the next one
        engine.draft.kill()
    engine.run_until(time.monotonic() + 2 * chance.random())
    engine.new_draft()


def kill_the_group(engine: Engine, chance: random.Random) -> None:
    """Launcher, torchrun and rank at once."""
    engine.draft.kill()
    engine.run_until(time.monotonic() + chance.random())
    engine.new_draft()


def stop_the_draft(engine: Engine, chance: random.Random) -> None:
    """For less or more than a draft may be silent."""
    seconds = MOST_STOPPED_S * chance.random()
    if rank := engine.draft_rank():
        rank.suspend()
        engine.run_until(time.monotonic() + seconds)
        rank.resume()


def let_a_liar_in(engine: Engine, chance: random.Random) -> None:
    """The draft's place is taken by one that sends garbage; then the draft may come back."""
    engine.draft.kill()
    with impostor(engine.address, engine.config) as link:
        garbage(link)
        engine.run_until(time.monotonic() + 0.5)
    engine.new_draft()


def flood_the_front_door(engine: Engine, chance: random.Random) -> None:
    """A second of nonsense, as fast as it goes."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.linger = 0
    dealer.connect(engine.address)
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        with contextlib.suppress(zmq.Again):
            dealer.send(chance.randbytes(20), zmq.NOBLOCK)
    dealer.close()
    context.term()


def flood_with_requests(engine: Engine, chance: random.Random) -> None:
    """A second of requests, as fast as it goes: most are refused, and their sender leaves before the rest are done."""
    until = time.monotonic() + 1.0
    with contextlib.closing(ControlPeer.connect(engine.address)) as control:
        for number in itertools.count():
            if time.monotonic() > until:
                return
            name = f"flood-{time.monotonic_ns()}-{number}"
            with contextlib.suppress(PeerLost):  # its own queue is full
                stream = chance.random() < 0.5
                control.send(Generate(name, prompt="lazy dog", max_tokens=100, ignore_eos=True, stream=stream))
            control.poll(0.0)


def leave_in_mid_stream(engine: Engine, chance: random.Random) -> None:
    """A client that asks for much and goes after the first words."""
    with contextlib.closing(Client(engine.address, 60.0)) as client:
        until = time.monotonic() + 60.0
        while True:
            request = Generate(f"left-{time.monotonic_ns()}", prompt="lazy dog", max_tokens=2000, ignore_eos=True)
            try:
                next(client.generate(request))
            except Overloaded:  # a flood was just before
                assert time.monotonic() < until
                engine.run_until(time.monotonic() + 0.1)
            else:
                return


FAULTS: dict[str, Callable[[Engine, random.Random], None]] = {
    "kill the draft": kill_the_draft,
    "kill the draft's group": kill_the_group,
    "stop the draft": stop_the_draft,
    "let a liar in": let_a_liar_in,
    "flood the front door": flood_the_front_door,
    "flood with requests": flood_with_requests,
    "leave in mid-stream": leave_in_mid_stream,
}
