"""The engine under soak: a target group, a draft group, and streams whose every token is checked."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from ssd_runtime.comm.control.client_messages import Finished, Generate, RequestStatistics, Status
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import Overloaded, SsdError
from ssd_runtime.speculation.types import SamplingParams
from ssd_runtime.stalls import Stall
from tests.process.conftest import CONFIG
from tests.process.runs import SSD, Run, eventually
from tests.tiny_models import write_hf

LENGTH = 200
TEXTS = 4  # different requests, by seed
WAIT_S = 120.0
QUEUED = 32  # requests that may wait: a flood of them is to meet the limit


@dataclass(frozen=True)
class Size:
    """What the leader's process holds."""

    resident: int
    threads: int
    files: int


@dataclass(frozen=True)
class Report:
    """The whole run. Milliseconds are of the leader's rounds: what it did besides verifying, and verifying.

    Attributes:
        busy: requests that were refused because too many waited, and put again.
        stalls: the longest gaps between two verifications, the longest first.
    """

    answers: int
    wrong: int
    failed: int
    busy: int
    lost: int
    linked: int
    hits_before: float
    hits_after: float
    stalls: tuple[Stall, ...]
    usual_ms: float
    verify_ms: float


class Engine:
    """Both groups.

    Args:
        directory: for models, configuration and logs.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        write_hf(directory / "target", seed=1, num_layers=12)
        write_hf(directory / "draft", seed=1, noise=0.02)
        self.config = directory / "run.toml"
        self.config.write_text(
            CONFIG.format(directory=directory) + f"rejoin = 600.0\n[serve]\nmax_queued_requests = {QUEUED}\n"
        )
        self._runs: list[Run] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._running: set[str] = set()  # ids of requests
        self._lock = threading.Lock()  # guards the four below
        self._measured: list[RequestStatistics] = []
        self._wrong: list[int] = []
        self._failed: list[str] = []
        self._busy = 0
        self._expected: dict[int, tuple[int, ...]] = {}

    def __enter__(self) -> Engine:
        self.target = self._start("up", "--role", "target")
        self.address = self.target.until("address: ", WAIT_S)
        self.draft = self.new_draft()
        return self

    def __exit__(self, *ending: object) -> None:
        self._stop.set()
        for run in self._runs:
            run.kill()

    def _start(self, *arguments: str) -> Run:
        run = Run(self._directory / f"run{len(self._runs)}", (*SSD, *arguments, "--config", str(self.config)))
        self._runs.append(run)
        return run

    def new_draft(self) -> Run:
        """Start a draft group; returns at once."""
        self.draft = self._start("up", "--role", "draft", "--target", self.address)
        return self.draft

    def begin(self, streams: int) -> None:
        """Let the draft join, learn the right answers from plain decoding, start the streams."""
        self.until_linked()
        with contextlib.closing(Client(self.address, WAIT_S)) as client:
            for seed in range(TEXTS):
                self._expected[seed] = self._answer(client, "ar", seed)[0]
            self._hits_before = _hit_rate(self._answer(client, "ssd", 0)[1])
        for number in range(streams):
            self._threads.append(threading.Thread(target=self._stream, args=(number,), daemon=True))
            self._threads[-1].start()

    def _stream(self, number: int) -> None:
        with contextlib.closing(Client(self.address, WAIT_S)) as client:
            seed = number
            while not self._stop.is_set():
                seed = (seed + 1) % TEXTS
                try:
                    tokens, measured = self._answer(client, "ssd", seed)
                except Overloaded:
                    with self._lock:
                        self._busy += 1
                    self._stop.wait(0.05)
                    continue
                except SsdError as error:
                    with self._lock:
                        self._failed.append(str(error))
                    return
                with self._lock:
                    self._measured.append(measured)
                    if tokens != self._expected[seed]:
                        self._wrong.append(seed)

    def _answer(self, client: Client, mode: str, seed: int) -> tuple[tuple[int, ...], RequestStatistics]:
        params = SamplingParams(temperature=0.8, seed=seed)
        name = f"{mode}-{seed}-{time.monotonic_ns()}"
        request = Generate(name, prompt="the quick brown fox", params=params, max_tokens=LENGTH, ignore_eos=True)
        request = Generate(**{**request.__dict__, "mode": mode, "samples": True})
        tokens: list[int] = []
        self._running.add(name)
        try:
            for message in client.generate(request):
                if isinstance(message, Finished):
                    return tuple(tokens), message.statistics
                tokens += message.token_ids
        finally:
            self._running.discard(name)
        raise AssertionError("a stream without an end")

    def running_ids(self) -> list[str]:
        """Of the streams' requests, now."""
        return list(self._running)

    # -- watching ------------------------------------------------------------------------------------------------

    def status(self) -> Status:
        with contextlib.closing(Client(self.address, WAIT_S)) as client:
            return client.status()

    def until_linked(self) -> None:
        eventually(lambda: self.status().draft == "linked", WAIT_S, "a draft is linked")

    def run_until(self, at: float) -> None:
        """Let it run; a process that ended unasked is an error at once."""
        while (left := at - time.monotonic()) > 0:
            assert not self.target.ended, self.target.err
            time.sleep(min(left, 0.2))

    def size(self) -> Size:
        leader = self.target.rank(0)
        return Size(leader.memory_info().rss, leader.num_threads(), leader.num_fds())

    def sizes_while_linked(self) -> list[Size]:
        """Its size, if a draft is linked now: a link has threads and open files of its own."""
        return [self.size()] if self.status().draft == "linked" else []

    def draft_rank(self) -> psutil.Process | None:
        """The draft's process, if it is up."""
        with contextlib.suppress(ValueError):
            return self.draft.rank(0)
        return None

    def summary(self) -> str:
        status = self.status()
        with self._lock:
            counts = f"{len(self._measured)} answers, {len(self._wrong)} wrong, {len(self._failed)} lost"
        return f"{counts}; draft {status.draft}, lost {status.drafts_lost}, linked {status.drafts_linked}"

    # -- the end -------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Wait until a draft is back, starting one if none lives."""
        if self.draft.ended:
            self.new_draft()
        self.until_linked()

    def end(self) -> Report:
        self._stop.set()
        for thread in self._threads:
            thread.join(WAIT_S)
            assert not thread.is_alive(), "a stream hangs"
        status = self.status()
        with contextlib.closing(Client(self.address, WAIT_S)) as client:
            after = _hit_rate(self._answer(client, "ssd", 0)[1])
            client.shutdown()
        rounds = [
            wait + other
            for measured in self._measured
            for wait, other in zip(measured.wait_ms.samples[1:], measured.other_ms.samples, strict=False)
        ]
        return Report(
            answers=len(self._measured),
            wrong=len(self._wrong),
            failed=len(self._failed),
            busy=self._busy,
            lost=status.drafts_lost,
            linked=status.drafts_linked,
            hits_before=self._hits_before,
            hits_after=after,
            stalls=status.stalls,
            usual_ms=statistics.median(rounds),
            verify_ms=statistics.median(ms for measured in self._measured for ms in measured.verify_ms.samples),
        )


def _hit_rate(measured: RequestStatistics) -> float:
    return measured.hits / max(1, measured.lookups)
