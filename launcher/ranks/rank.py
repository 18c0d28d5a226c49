"""What every rank has, whatever its role: a place, signals, a trace, models to load."""

from __future__ import annotations

import gc
import logging
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from launcher.ranks.announcer import Announcer
from launcher.ranks.models import Models
from ssd_runtime.comm.link.endpoint import LinkTiming
from ssd_runtime.config import Config
from ssd_runtime.errors import InputOutputError
from ssd_runtime.host import topology
from ssd_runtime.host.cores import Claims
from ssd_runtime.trace import Tracer, part_path

log = logging.getLogger("ssd.rank")

DESCRIPTORS = 1 << 16  # a process may want; connections of strangers take some of them for a while


class Stopped(Exception):  # not an error: a signal came before the loop was there to be asked
    """A signal asked this rank to leave."""


@dataclass(frozen=True)
class Surroundings:
    """What a rank is started with.

    Attributes:
        config: of the run.
        place: role, device and cores of this rank.
        announcer: to the launcher.
        trace: where the run's trace goes; None for no trace.
    """

    config: Config
    place: topology.Placement
    announcer: Announcer
    trace: Path | None


class Rank:
    """One rank; the roles fill in `serve`."""

    def __init__(self, surroundings: Surroundings) -> None:
        self._config = surroundings.config
        self._place = place = surroundings.place
        self._announcer = surroundings.announcer
        self._models = Models(self._config, place, self._announcer)
        self._trace = surroundings.trace
        self._tracer = Tracer(f"{place.role} rank {place.rank}", enabled=self._trace is not None, sort_index=place.rank)
        self._on_stop: Callable[[str], None] | None = None
        self._stopped = False
        self._claims = Claims()
        self._cores: tuple[int, ...] = ()  # it is pinned to

    def run(self) -> None:
        """Until told to leave. Raises SsdError for everything that can go wrong."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._signalled)
        self._cores = topology.settle(self._place, self._claims)
        _allow_descriptors()
        try:
            with self._models.computing():
                self.serve()
        except Stopped as stopped:
            log.info("leaving: %s", stopped)
        finally:
            self._claims.release()
            if self._trace is not None:
                self._leave_trace(self._trace)

    def serve(self) -> None:
        """The work of the role."""
        raise NotImplementedError

    def _leave_trace(self, path: Path) -> None:
        """This rank's part of it. Without one the launcher says so; how the rank ended is another matter."""
        try:
            self._tracer.write(part_path(path, self._place.rank))
        except InputOutputError as error:
            log.error("%s", error)

    def _signalled(self, signum: int, frame: FrameType | None) -> None:
        reason = f"received {signal.Signals(signum).name}"
        if self._on_stop is not None:
            self._on_stop(reason)
        elif not self._stopped:  # once: a second signal must not break the clean-up that the first began
            self._stopped = True
            raise Stopped(reason)


def _allow_descriptors() -> None:
    """Raise the limit of open files as far as this process may, DESCRIPTORS at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def forget_loading() -> None:
    """Let garbage collections pass over all that was made so far, torch's modules above all, which stays to the end.

    A full collection looks at every object: with these, hundreds of thousands, it would hold up a round.
    """
    gc.collect()
    gc.freeze()


def link_timing(config: Config) -> LinkTiming:
    """The deadlines of the link, the same for both roles."""
    timeouts = config.timeouts
    return LinkTiming(
        build=timeouts.handshake,
        heartbeat=timeouts.idle_heartbeat,
        silence=max(timeouts.link, 3 * timeouts.idle_heartbeat),
    )
