"""The same request again and again in a thread of its own, while a test does harm to the engine."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from ssd_runtime.comm.control.client_messages import Finished, Generate
from ssd_runtime.config import Mode
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import SsdError
from ssd_runtime.speculation.types import SamplingParams


@dataclass(frozen=True)
class Answer:
    """One finished stream. `longest_gap`: seconds between two chunks; `longest_wait`: of a round for drafts."""

    tokens: tuple[int, ...]
    hit_rate: float
    longest_gap: float
    longest_wait: float


def asked(mode: Mode, max_tokens: int) -> Generate:
    """Always for the same text."""
    return Generate(
        f"{mode}-{time.monotonic_ns()}",
        prompt="the quick brown fox",
        max_tokens=max_tokens,
        ignore_eos=True,
        mode=mode,
        params=SamplingParams(temperature=0.8, seed=3),
    )


def answer(client: Client, mode: Mode, max_tokens: int, on_first: Callable[[], None] = lambda: None) -> Answer:
    """One stream; calls `on_first` when it has begun."""
    tokens: list[int] = []
    gap, last = 0.0, None
    for message in client.generate(asked(mode, max_tokens)):
        if last is None:
            on_first()
        now = time.monotonic()
        gap, last = max(gap, now - (last or now)), now
        if isinstance(message, Finished):
            statistics = message.statistics
            wait = (statistics.wait_ms.most or 0.0) / 1e3
            return Answer(tuple(tokens), statistics.hits / max(1, statistics.lookups), gap, wait)
        tokens += message.token_ids
    raise AssertionError("a stream without an end")


class Streams:
    """Asks an engine for the same text until stopped.

    Attributes:
        answers: so far.
        failure: what ended it early.
    """

    def __init__(self, address: str, max_tokens: int) -> None:
        self._address, self._max_tokens = address, max_tokens
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.answers: list[Answer] = []
        self.failure: SsdError | None = None

    def __enter__(self) -> Streams:
        self._thread.start()
        return self

    def __exit__(self, *ending: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "a stream hangs"

    def _run(self) -> None:
        with contextlib.closing(Client(self._address, 20.0)) as client:
            for _ in itertools.takewhile(lambda _: not self._stop.is_set(), itertools.count()):
                try:
                    self.answers.append(answer(client, "ssd", self._max_tokens))
                except SsdError as error:
                    self.failure = error
                    return
