"""The process at the other end of the link that nccl_link.py measures: a draft that answers each outcome frame.

Both ends know every frame of every round, so each tells whether what came is what was sent.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from launcher.ranks import nccl
from ssd_runtime.comm.control.draft_messages import LinkAddress
from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.comm.link.setup import open_draft_link
from ssd_runtime.comm.protocol import FrameShape
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import Branch, Outcome, OutcomeFrame, OutcomeRow, Source, TreeFrame
from tests.conformance.nccl_stand_in import stand_in

SEQUENCES, LOOKAHEAD, BUDGET = 4, 6, 24
SHAPE = FrameShape.of(SEQUENCES, LOOKAHEAD, BUDGET)
SOON = 60.0  # seconds for another process to do what it was told
MATRIX = {"cuda": 8192, "cpu": 512}  # a product takes a millisecond or two: as long as the launches of a large layer
QUEUED = 8  # products that wait on the GPU while it is busy


def outcomes(round: int) -> OutcomeFrame:
    """What the target says in a round; every seventh has no rows."""
    choose = random.Random(round)
    tokens = tuple(choose.randrange(1 << 30) for _ in range(LOOKAHEAD))
    rows = [
        OutcomeRow(sequence, round, Outcome(choose.randrange(LOOKAHEAD), tokens[0]), Source.DRAFT, LOOKAHEAD, tokens)
        for sequence in range(SEQUENCES)
    ]
    return OutcomeFrame(round, round, tuple(rows) if round % 7 else ())


def tree(round: int) -> TreeFrame:
    """What the draft answers; its size varies."""
    choose = random.Random(-round)
    return TreeFrame(
        round,
        tuple(
            Branch(
                index % SEQUENCES, round, Outcome(index % (LOOKAHEAD + 1), choose.randrange(1 << 30)), (round, index)
            )
            for index in range(choose.randrange(1, SEQUENCES * BUDGET))
        ),
        900,
        4,
    )


class Draft:
    """The draft's process."""

    def __init__(self, device: torch.device, timing: LinkTiming) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_answer, args=(theirs, device, timing), daemon=True)
        self._process.start()
        theirs.close()

    def come(self, address: LinkAddress, gpu: torch.device | None, busy: bool) -> None:
        self._pipe.send((address, gpu, busy))

    def told(self) -> Any:
        assert self._pipe.poll(SOON), "the draft's process says nothing"
        return self._pipe.recv()

    def strike(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def close(self) -> None:
        self._process.kill()
        self._process.join(SOON)
        self._pipe.close()


def _answer(pipe: Connection, device: torch.device, timing: LinkTiming) -> None:
    """What the draft's process runs: a link after the other, each until the target closes it."""
    torch.set_num_threads(1)
    nccl.apply()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        stand_in()
    while True:
        try:
            address, gpu, is_busy = pipe.recv()
        except EOFError:
            return
        heard = wrong = 0
        with contextlib.ExitStack() as held:
            if is_busy:
                held.enter_context(busy(device))
            link = open_draft_link(address, timing, gpu)
            held.callback(link.close)
            with contextlib.suppress(PeerLost):
                while True:
                    for frame in link.receive(SOON):
                        wrong += frame != outcomes(heard)
                        heard += 1
                        link.send(tree(frame.round))
        pipe.send((heard, wrong))


@contextlib.contextmanager
def busy(device: torch.device) -> Iterator[None]:
    """A GPU that always has products to work on, as in a forward that is queued far ahead."""
    over = threading.Event()

    def multiply() -> None:
        size = MATRIX[device.type]
        x = torch.ones(size, size, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, device=device)
        ahead: list[torch.cuda.Event] = []
        while not over.is_set():
            torch.mm(x, x)
            if device.type == "cuda":
                ahead.append(torch.cuda.Event(blocking=True))
                ahead[-1].record()
                if len(ahead) > QUEUED:
                    ahead.pop(0).synchronize()

    thread = threading.Thread(target=multiply, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(SOON)
