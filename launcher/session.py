"""An engine to talk to: started here and ended with the block, or one that runs already. Knows no requests."""

from __future__ import annotations

import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from launcher.torchrun import Launch, Ranks, run_directory
from ssd_runtime import trace
from ssd_runtime.comm.control.launcher_messages import Progress
from ssd_runtime.comm.hosts import resolve, split
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import ConfigError, InputOutputError, Overloaded, PeerLost, RequestError, SsdError
from ssd_runtime.host.cores import crowding
from ssd_runtime.model.random.models import label

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # a leader answers between two forwards
GONE_S = 5.0  # torchrun notices within this time that a rank is gone, and ends the others
Loading = Callable[[], contextlib.AbstractContextManager[Callable[[Progress], None]]]


@dataclass(frozen=True)
class Session:
    """A client of a running engine.

    Attributes:
        client: takes requests.
        address: of the engine, for other clients.
        cores: role -> CPU cores it is pinned to.
        ranks: of an engine started here.
        label: what must be said beside its text and figures (model/random/models.py); None of real models.
    """

    client: Client
    address: str
    cores: dict[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Ranks | None = None
    label: str | None = None


@contextlib.contextmanager
def connected(address: str, timeout_s: float) -> Iterator[Session]:
    """A session with an engine that runs already, and goes on running.

    Raises:
        ConfigError: no engine answers at the address.
    """
    try:
        _knock(address)
        with contextlib.closing(Client(address, ANSWER_S)) as client:
            status = client.status()
    except (PeerLost, OSError) as error:
        reason = error.reason if isinstance(error, PeerLost) else error.strerror or "it took too long"
        raise ConfigError(f"no engine answers at {address} ({reason}); start one with `ssd up`") from None
    with contextlib.closing(Client(address, timeout_s)) as client:
        yield Session(client, address, status.cores, label=label(status.target_model, status.draft_model))


@contextlib.contextmanager
def started(launch: Launch, loading: Loading) -> Iterator[Session]:
    """Start the ranks, wait for them, and end them with the block, whatever ends it.

    Args:
        launch: what to start.
        loading: shows how the ranks come up, for as long as they do.

    Raises:
        ConfigError: the ranks found something that the user can mend.
        SsdError: the ranks broke; the message names their log.
    """
    ranks = Ranks(launch, run_directory())
    client: Client | None = None
    key = ""
    try:
        ranks.start()
        with loading() as on_progress:
            ready = ranks.wait_ready(on_progress)
        if (crowd := crowding(ready.cores)) is not None:
            log.warning("%s", crowd)
        key = ready.key
        client = Client(ready.address, launch.config.timeouts.load)
        try:
            config = launch.config
            yield Session(client, ready.address, ready.cores, ranks, label(config.target.model, config.draft.model))
        except (ConfigError, RequestError, Overloaded):
            raise
        except SsdError as error:
            if not ranks.wait(GONE_S):
                ranks.raise_if_failed()  # the ranks know better than the client what happened
            raise SsdError(f"{error}; {ranks.see_log()}") from error
    finally:
        with uninterrupted():
            _end(ranks, client, key)
            _join_trace(launch)


@contextlib.contextmanager
def joined(launch: Launch) -> Iterator[Ranks]:
    """Start ranks whose leader is elsewhere, on another node or in another torchrun, and end them with the block."""
    ranks = Ranks(launch, run_directory())
    try:
        ranks.start()
        yield ranks
    finally:
        with uninterrupted():
            _end(ranks, None, "")
            _join_trace(launch)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Keep Ctrl-C, SIGTERM and SIGHUP from cutting a (bounded) clean-up short."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {signum: signal.signal(signum, signal.SIG_IGN) for signum in signals}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _knock(address: str) -> None:
    """Raise OSError at once if nobody listens there; ZeroMQ would go on trying."""
    with contextlib.suppress(ValueError):  # the client says what is wrong with it
        host, port = split(address)
        with socket.socket((there := resolve(host, port))[0]) as probe:
            probe.settimeout(ANSWER_S)
            probe.connect(there[1])


def _join_trace(launch: Launch) -> None:
    """One trace of the parts that ranks of this host left; raises InputOutputError if it is not whole."""
    if launch.trace is None:
        return
    another = isinstance(sys.exception(), SsdError)  # is on its way already, and says more
    parts = trace.part_paths(launch.trace, sum(launch.ranks_by_role))
    lost = [str(rank) for rank, part in enumerate(parts) if launch.nodes.count == 1 and not part.exists()]
    try:
        trace.merge_parts(launch.trace, parts)
        if lost:
            reason = f"rank {', '.join(lost)} left no part: it was killed, or could not write there"
            raise InputOutputError(f"trace {launch.trace} is not whole: {reason}")
    except InputOutputError:
        if not another:
            raise


def _end(ranks: Ranks, client: Client | None, key: str) -> None:
    """Ask the leader to end both roles; then see to it.

    Args:
        key: of the engine; the leader may be at an address from which others may not end it.
    """
    grace = ranks.launch.config.timeouts.shutdown
    deadline = time.monotonic() + grace
    if client is not None:
        try:
            if ranks.is_running():
                client.shutdown(key, timeout_s=grace)
                ranks.wait(deadline - time.monotonic())
        except SsdError as error:
            log.debug("the engine does not answer to shutdown: %s", error)
        client.close()
    ranks.stop(max(deadline - time.monotonic(), 1.0))
