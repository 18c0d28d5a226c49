"""The link over NCCL between two processes on one GPU: whole frames, quick ends, and its times beside Gloo's."""

from __future__ import annotations

import contextlib
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch

from launcher.ranks import nccl
from ops.gpu.nccl_draft import SHAPE, SOON, Draft, busy, outcomes, tree
from ops.gpu.result import Finding, Number, Setting, judged, left_out, run_step
from ops.gpu.timing import device_of
from ssd_runtime.comm.link.endpoint import LinkTiming, TargetLink
from ssd_runtime.comm.link.setup import LinkHost
from ssd_runtime.errors import PeerLost
from ssd_runtime.speculation.types import TreeFrame
from tests.conformance.nccl_stand_in import stand_in

LABEL = (
    "Two processes on one GPU take turns on it: what NCCL takes here is an upper bound of what it takes between two."
)
LEAST_NCCL = (2, 31)
IN_FLIGHT = 4  # outcome frames that are sent before the first is answered
AMID_S = 0.5  # from the first frame to the end of the other process


@dataclass(frozen=True)
class Bench:
    """This process, the target."""

    host: LinkHost
    device: torch.device
    timing: LinkTiming
    rounds: int

    @contextlib.contextmanager
    def link(self, draft: Draft, carrier: str, is_busy: bool = False) -> Iterator[TargetLink]:
        gpu = self.device if carrier == "nccl" else None
        address = self.host.next_address(SHAPE)
        draft.come(address, gpu, is_busy)
        with contextlib.closing(self.host.open(address, self.timing, gpu)) as link:
            yield link

    def conversation(self, draft: Draft, carrier: str, is_busy: bool) -> Finding:
        """Rounds back and forth, timed, then as many with several frames on their way."""
        wrong, times = 0, []
        with busy(self.device) if is_busy else contextlib.nullcontext():
            with self.link(draft, carrier, is_busy) as link:
                for round in range(self.rounds):
                    start = time.perf_counter()
                    link.send(outcomes(round))
                    wrong += newest_tree(link, round) != tree(round)
                    times.append((time.perf_counter() - start) * 1e6)
                for round in range(self.rounds, 2 * self.rounds):
                    link.send(outcomes(round))
                    if (round + 1) % IN_FLIGHT == 0:
                        wrong += newest_tree(link, round) != tree(round)
            heard, theirs = draft.told()
        cuts = statistics.quantiles(times, n=20)
        numbers = Number("round trips", len(times)), Number("p50", cuts[9], "us"), Number("p95", cuts[18], "us")
        whole = heard == 2 * self.rounds and wrong == theirs == 0
        return judged(f"{carrier}, {'busy' if is_busy else 'idle'}", whole, Number("wrong", wrong + theirs), *numbers)

    def loss(self, draft: Draft, number: signal.Signals) -> Finding:
        """How long a draft that dies or stops amid frames goes unnoticed; whether anything spins on the GPU then."""
        struck: list[float] = []

        def strike() -> None:
            struck.append(time.monotonic())
            draft.strike(number)

        timer = threading.Timer(AMID_S, strike)
        with self.link(draft, "nccl") as link:
            timer.start()
            with contextlib.suppress(PeerLost):
                for round in range(1_000_000):
                    link.send(outcomes(round))
                    newest_tree(link, round)
            noticed = time.monotonic()
        closed = time.monotonic()
        timer.join()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        quiet = time.monotonic()
        seconds = noticed - struck[0], closed - noticed, quiet - closed
        most = self.timing.silence + 1, self.timing.close + 1, 1
        numbers = (Number(name, took, "s") for name, took in zip(("noticed", "closed", "quiet"), seconds, strict=True))
        return judged(f"{number.name} amid frames", all(map(float.__le__, seconds, map(float, most))), *numbers)


def newest_tree(link: TargetLink, round: int) -> TreeFrame:
    """That of the round; older ones that had not been superseded yet are passed over."""
    while True:
        for frame in link.receive(SOON):
            if frame.round == round:
                return frame


def find(setting: Setting) -> Iterator[Finding]:
    device = device_of(setting)
    nccl.apply()
    with contextlib.ExitStack() as held:
        if device.type == "cuda":
            found = torch.cuda.nccl.version()
            version = Number("version", ".".join(map(str, found)))
            yield judged("NCCL for several ranks a GPU", found >= LEAST_NCCL, version)
        else:
            stand_in(lambda *what: held.enter_context(mock.patch.object(*what)))
            yield left_out("NCCL for several ranks a GPU", "Gloo stands in for NCCL, and a thread for a stream")
        host = held.enter_context(contextlib.closing(LinkHost("127.0.0.1")))
        silence = 1.5 if setting.small else 4.0
        timing = LinkTiming(build=SOON, heartbeat=silence / 5, silence=silence, close=2.0)
        bench = Bench(host, device, timing, 100 if setting.small else 2000)
        with contextlib.closing(Draft(device, timing)) as draft:
            yield from _conversations(bench, draft)
            yield bench.loss(draft, signal.SIGKILL)
        with contextlib.closing(Draft(device, timing)) as draft:
            yield bench.conversation(draft, "nccl", is_busy=False)  # the next link, after one that was lost
            yield bench.loss(draft, signal.SIGSTOP)
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("link-")]
    yield judged("no thread is left", not left, note=", ".join(left))


def _conversations(bench: Bench, draft: Draft) -> Iterator[Finding]:
    """Both carriers, idle and busy, and what `link.backend = "auto"` waits for."""
    p50 = {}
    for is_busy in (False, True):
        for carrier in ("gloo", "nccl"):
            finding = bench.conversation(draft, carrier, is_busy)
            p50[carrier, is_busy] = next(float(number.value) for number in finding.numbers if number.name == "p50")
            yield finding
    ratios = (
        Number(name, p50["nccl", which] / p50["gloo", which]) for name, which in (("idle", False), ("busy", True))
    )
    yield Finding("NCCL's p50 over Gloo's", tuple(ratios), note="auto takes NCCL where all is right and this at most 1")


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find, (LABEL,)))
