"""Where the time between two verifications went: laps of the leader's thread, kept for the longest gaps.

What this process did is told from what was done to it: beside the wall clock there are the thread's CPU time and the
time for which it could have run and was not (`/proc/thread-self/schedstat`, Linux). Knows nothing of what is done.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import time
from dataclasses import dataclass
from typing import Annotated

from ssd_runtime.bounds import AtMost, Within

log = logging.getLogger(__name__)

KEPT = 32  # gaps
TOLD_MS = 100.0  # longer ones are logged
SHORT_NS = 1_000_000  # a lap that is shorter counts to the next

Milliseconds = Annotated[float, Within(0.0, 1e12)]


@dataclass(frozen=True)
class Lap:
    """One thing that was done in a gap. Milliseconds.

    Attributes:
        wall: how long it took.
        cpu: of them, on a core.
        delayed: of them, ready to run while the system ran something else.
        awaited: of them, asleep until a draft says something.
    """

    name: Annotated[str, AtMost(256)]
    wall: Milliseconds
    cpu: Milliseconds
    delayed: Milliseconds
    awaited: Milliseconds = 0.0

    @property
    def blocked(self) -> float:
        """The rest: asleep for a lock (the interpreter's, too), a page or a file."""
        return max(0.0, self.wall - self.cpu - self.delayed - self.awaited)


@dataclass(frozen=True)
class Stall:
    """One gap between two verifications, with sequences that were held up by it.

    Attributes:
        round: the one that began late.
        at: its beginning, in seconds of time.monotonic.
    """

    round: Annotated[int, Within(0, 2**48)]
    at: Annotated[float, Within(0.0, 1e12)]
    laps: Annotated[tuple[Lap, ...], AtMost(2**16)]

    @property
    def milliseconds(self) -> float:
        return sum(lap.wall for lap in self.laps)

    @property
    def delayed(self) -> float:
        """Milliseconds for which the system ran something else: not this program's doing."""
        return sum(lap.delayed for lap in self.laps)

    def causes(self) -> dict[str, float]:
        """Milliseconds by cause, the greatest first."""
        found = {"awaiting a draft": sum(lap.awaited for lap in self.laps), "not run by the system": self.delayed}
        for lap in self.laps:
            for cause, milliseconds in ((lap.name, lap.cpu), (f"blocked in {lap.name}", lap.blocked)):
                found[cause] = found.get(cause, 0.0) + milliseconds
        return dict(sorted(((cause, ms) for cause, ms in found.items() if ms > 0), key=lambda item: -item[1]))

    def __str__(self) -> str:
        causes = [f"{milliseconds:.0f} {cause}" for cause, milliseconds in self.causes().items() if milliseconds >= 1]
        return f"{self.milliseconds:.0f} ms before round {self.round}: {', '.join(causes) or 'nothing in particular'}"


@dataclass(frozen=True)
class Reading:
    """The clocks of one thread, in nanoseconds.

    Attributes:
        wall: of time.monotonic.
        cpu: spent on a core.
        delayed: spent ready to run without a core.
        sleeps: how often the thread went to sleep of its own will.
    """

    wall: int
    cpu: int
    delayed: int
    sleeps: int


class ThreadClock:
    """Reads them for the thread that asks first, which must be the only one to ask."""

    def __init__(self) -> None:
        self._schedstat: int | None = None

    def wall(self) -> int:
        return time.monotonic_ns()

    def read(self) -> Reading:
        """Some microseconds of work."""
        if self._schedstat is None:
            self._schedstat = -1
            with contextlib.suppress(OSError):  # not Linux, or without CONFIG_SCHED_INFO
                self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
        delayed = int(os.pread(self._schedstat, 64, 0).split()[1]) if self._schedstat >= 0 else 0
        sleeps = resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw
        return Reading(time.monotonic_ns(), time.thread_time_ns(), delayed, sleeps)

    def __del__(self) -> None:
        if self._schedstat is not None and self._schedstat >= 0:
            os.close(self._schedstat)


class StallWatch:
    """Splits gaps into laps and keeps the longest.

    Args:
        clock: of the thread that decodes.
        kept: how many gaps.
    """

    def __init__(self, clock: ThreadClock | None = None, kept: int = KEPT) -> None:
        self._clock = clock or ThreadClock()
        self._kept = kept
        self._began = 0
        self._last: Reading | None = None  # the end of the last lap
        self._laps: list[Lap] = []
        self._open = ""  # a lap too short to be worth a reading, to be counted to the next
        self._awaited_s = 0.0
        self._longest: list[Stall] = []  # the longest first

    def begin(self) -> None:
        """A gap begins: a verification has ended, or nobody is there who could be held up."""
        self._last = self._clock.read()
        self._began = self._last.wall
        self._laps.clear()
        self._open, self._awaited_s = "", 0.0

    def lap(self, name: str, awaited_s: float = 0.0) -> None:
        """What was done since the last lap was `name`; for `awaited_s` of it a draft was waited for."""
        if self._last is None:
            return
        self._open = name
        self._awaited_s += awaited_s
        if self._clock.wall() - self._last.wall >= SHORT_NS:
            self._close()

    def end(self, round: int, *, held_up: bool) -> None:
        """A verification begins; was anyone `held_up`, or is this the first for all of them?"""
        if not held_up or self._last is None:
            return
        milliseconds = (self._clock.wall() - self._began) / 1e6
        if len(self._longest) == self._kept and milliseconds <= self._longest[-1].milliseconds:
            return
        if self._open:
            self._close()
        stall = Stall(round, self._began / 1e9, tuple(self._laps))
        self._longest = sorted([*self._longest, stall], key=lambda one: -one.milliseconds)[: self._kept]
        if stall.milliseconds > TOLD_MS:
            log.info("%s", stall)

    @property
    def longest(self) -> tuple[Stall, ...]:
        """The longest gaps, the longest first."""
        return tuple(self._longest)

    def _close(self) -> None:
        assert self._last is not None
        now, last = self._clock.read(), self._last
        self._last = now
        wall, cpu = (now.wall - last.wall) / 1e6, (now.cpu - last.cpu) / 1e6
        delayed = (now.delayed - last.delayed) / 1e6
        if now.sleeps == last.sleeps:  # awake all the time: a virtual machine that is halted knows of no delay
            delayed = max(delayed, wall - cpu)
        awaited = min(self._awaited_s * 1e3, max(0.0, wall - cpu - delayed))
        self._laps.append(Lap(self._open, wall, cpu, delayed, awaited))
        self._open, self._awaited_s = "", 0.0
