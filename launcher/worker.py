"""The entry point of a rank under torchrun: `python -m torch.distributed.run ... -m launcher.worker --config X`.

Finds its role, loads its model, meets the other side, runs its loop, and says what went wrong in one line. Rank 0 is
the target and leads; rank 1 drafts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import click
import torch.distributed as dist
import zmq

from launcher import processes
from ssd_runtime import logs, topology
from ssd_runtime.comm.codec import encode
from ssd_runtime.comm.control import ControlPeer, ControlServer
from ssd_runtime.comm.link import LinkHost, LinkTiming, open_draft_link, open_target_link
from ssd_runtime.comm.messages import Hello, Message, Progress, Ready, Refused, Shutdown, Welcome, WorkerFailed
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape
from ssd_runtime.config import Config, Mode, load_config
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.draft.loop import DraftLoop
from ssd_runtime.engine.engine import Engine
from ssd_runtime.engine.speculator import NoSpeculation, Speculator
from ssd_runtime.errors import ConfigError, SsdError
from ssd_runtime.model.catalogue import resolve
from ssd_runtime.model.decoder import Decoder
from ssd_runtime.model.load import load_decoder
from ssd_runtime.model.tokenizer import Tokenizer
from ssd_runtime.target.colocated import ColocatedSpeculator
from ssd_runtime.target.draft_peer import DraftPeer, welcome_draft
from ssd_runtime.target.leader import Leader, Stop
from ssd_runtime.target.link_speculator import LinkSpeculator
from ssd_runtime.trace import Tracer, part_path

log = logging.getLogger("ssd.worker")

CONTROL_KEY = "ssd/control"


class Stopped(Exception):  # not an error: a signal came before the loop was there to be asked
    """A signal asked this rank to leave."""


@dataclass
class Announcer:
    """Tells the launcher how it goes; silent when started by hand."""

    address: str | None

    def __post_init__(self) -> None:
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        if self.address is not None:
            self._socket = self._context.socket(zmq.PUSH)
            self._socket.linger = 1000
            self._socket.connect(self.address)

    def say(self, message: Message) -> None:
        if self._socket is not None:
            with contextlib.suppress(zmq.Again):
                self._socket.send(encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._context.term()


class Worker:
    """One rank.

    Args:
        config: of the run.
        place: role, device and cores of this rank.
        announcer: to the launcher.
        trace: where the run's trace goes; None for no trace.
    """

    def __init__(self, config: Config, place: topology.Placement, announcer: Announcer, trace: Path | None) -> None:
        self._config = config
        self._place = place
        self._announcer = announcer
        self._trace = trace
        self._tracer = Tracer(f"{place.role} rank {place.rank}", enabled=trace is not None, sort_index=place.rank)
        self._stop = Stop()
        self._on_stop: Callable[[str], None] | None = None

    def run(self) -> None:
        """Until told to leave. Raises SsdError for everything that can go wrong."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._signalled)
        topology.settle(self._place)
        try:
            if self._place.role == "target":
                self._run_target()
            else:
                self._run_draft()
        except Stopped as stopped:
            log.info("leaving: %s", stopped)
        finally:
            if self._trace is not None:
                self._tracer.write(part_path(self._trace, self._place.rank))

    def _signalled(self, signum: int, frame: FrameType | None) -> None:
        reason = f"received {signal.Signals(signum).name}"
        if self._on_stop is None:
            raise Stopped(reason)
        self._on_stop(reason)

    # -- target --------------------------------------------------------------------------------------------------

    def _run_target(self) -> None:
        config, has_draft = self._config, self._place.world_size > 1
        with contextlib.closing(ControlServer(config.serve.host, config.serve.port)) as server:
            store = _store(config) if has_draft else None  # kept to the end: it may be this rank's own to serve
            if store is not None:
                store.set(CONTROL_KEY, server.address)
            tokenizer = Tokenizer.from_model(resolve(config.target.model))
            decoder = self._load("target", config.target.model, config.target.dtype)
            with self._speculators(server, decoder, tokenizer) as speculators:
                link = speculators.get("ssd")
                assert link is None or isinstance(link, LinkSpeculator)
                engine = Engine(decoder, config.engine, config.speculation.lookahead, speculators, self._tracer)
                cores = topology.cores_by_role(config, self._place.world_size)
                leader = Leader(config, engine, tokenizer, server, link, cores, self._stop)
                self._on_stop = self._set_stop
                self._announcer.say(Ready(server.address, cores))
                if self._announcer.address is None:  # started by hand: nobody else says it
                    click.echo(f"address: {server.address}")
                log.info("ready at %s", server.address)
                leader.run()
                log.info("leaving: %s", self._stop.reason)

    def _set_stop(self, reason: str) -> None:
        self._stop.reason = self._stop.reason or reason

    @contextlib.contextmanager
    def _speculators(
        self, server: ControlServer, decoder: Decoder, tokenizer: Tokenizer
    ) -> Iterator[dict[Mode, Speculator]]:
        """How this engine can speculate: every mode the ranks at hand allow."""
        config = self._config
        speculators: dict[Mode, Speculator] = {"ar": NoSpeculation()}
        if self._place.world_size == 1:
            if config.speculation.mode == "sd-colocated":
                drafter = self._drafter(tokenizer)
                speculators["sd-colocated"] = ColocatedSpeculator(lambda: drafter)
            yield speculators
            return
        with contextlib.closing(LinkHost(_link_host(config), timeout_s=config.timeouts.link)) as host:
            peer = self._welcome(server, host, tokenizer)
            vocab_size = decoder.arch.vocab_size
            link = LinkSpeculator(peer, config.speculation.backup, vocab_size, config.timeouts.link)
            colocated = ColocatedSpeculator(lambda: self._drafter(tokenizer))
            speculators |= {"ssd": link, "sd": link, "sd-colocated": colocated}
            try:
                yield speculators
            finally:
                peer.close(self._stop.reason or "the target failed")

    def _drafter(self, tokenizer: Tokenizer) -> Drafter:
        """A draft in this process."""
        config = self._config
        draft = Tokenizer.from_model(resolve(config.draft.model))
        reason = tokenizer.vocabulary().difference(draft.vocabulary())
        if reason is not None:
            raise ConfigError(f"target {config.target.model} and draft {config.draft.model} do not fit: {reason}")
        decoder = self._load("draft in the target's process", config.draft.model, config.draft.dtype)
        return Drafter(decoder, config.engine, config.speculation, len(draft.vocabulary().tokens))

    def _welcome(self, server: ControlServer, host: LinkHost, tokenizer: Tokenizer) -> DraftPeer:
        config = self._config
        speculation = config.speculation
        peer = welcome_draft(
            server,
            host,
            FrameShape.of(config.engine.max_num_seqs, max(1, speculation.lookahead), speculation.budget),
            config_digest=config.digest(),
            vocabulary=tokenizer.vocabulary().digest(),
            timing=_link_timing(config),
            deadline_s=config.timeouts.load + config.timeouts.handshake,
            stopping=lambda: bool(self._stop),
            open_link=lambda address, timing: open_target_link(address, timing, **self._frames_travel_by()),
        )
        if peer is None:
            raise Stopped(self._stop.reason)
        return peer

    # -- draft ---------------------------------------------------------------------------------------------------

    def _run_draft(self) -> None:
        config = self._config
        patience = config.timeouts.load + config.timeouts.handshake
        address = _await_key(_store(config), CONTROL_KEY, patience)
        tokenizer = Tokenizer.from_model(resolve(config.draft.model))
        decoder = self._load("draft", config.draft.model, config.draft.dtype)
        with contextlib.closing(ControlPeer(address)) as control:
            vocabulary = tokenizer.vocabulary().digest()
            control.send(Hello(PROTOCOL_VERSION, "draft", self._place.rank, config.digest(), vocabulary))
            answer = control.wait_for(Welcome, Refused, Shutdown, timeout_s=patience)
            if isinstance(answer, Refused):
                raise ConfigError(f"the target refused this draft: {answer.reason}")
            if not isinstance(answer, Welcome):
                return
            link = open_draft_link(answer.link, _link_timing(config), **self._frames_travel_by())
            with contextlib.closing(link):
                drafter = Drafter(decoder, config.engine, config.speculation, len(tokenizer.vocabulary().tokens))
                loop = DraftLoop(drafter, control, link, self._tracer, config.timeouts.link)
                self._on_stop = loop.stop
                loop.run()

    # -- both ----------------------------------------------------------------------------------------------------

    def _frames_travel_by(self) -> dict[str, Any]:
        backend = self._place.link_backend
        return {"backend": backend, "device": topology.link_device(backend, self._place.device)}

    def _load(self, phase: str, model: str, dtype: Any) -> Decoder:
        def progress(fraction: float) -> None:
            self._announcer.say(Progress(self._place.role, self._place.rank, f"load {phase}", fraction))

        progress(0.0)
        decoder = load_decoder(resolve(model), dtype, self._place.device, progress)
        decoder.arch.check_length(self._config.engine.max_model_len, f"{phase} model {model}")
        return decoder


def _store(config: Config) -> Any:
    """A client of torchrun's own store: built directly, since init_process_group would join a world of all ranks."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serve = not agent_serves and os.environ["RANK"] == "0"
    timeout = timedelta(seconds=config.timeouts.handshake)
    try:
        store = dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:
        raise ConfigError(f"cannot reach torchrun's store at {host}:{port}: {str(error).splitlines()[0]}") from None
    return dist.PrefixStore(f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{_restarts()}", store)


def _restarts() -> str:
    """A restarted world must not read what the last one wrote. All ranks of one agent see the same count."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _await_key(store: Any, key: str, timeout_s: float) -> str:
    try:
        store.wait([key], timedelta(seconds=timeout_s))
        value: bytes = store.get(key)
    except RuntimeError:
        raise ConfigError(f"no target came within {timeout_s:g} s: is rank 0 running?") from None
    return value.decode()


def _link_timing(config: Config) -> LinkTiming:
    timeouts = config.timeouts
    return LinkTiming(
        build=timeouts.handshake,
        heartbeat=timeouts.idle_heartbeat,
        silence=max(timeouts.link, 3 * timeouts.idle_heartbeat),
    )


def _link_host(config: Config) -> str:
    """Where the draft finds the link's store: the front door's host, or torchrun's if that one is a wildcard."""
    host = config.serve.host
    return os.environ["MASTER_ADDR"] if host in ("0.0.0.0", "*") else host


@click.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--announce", metavar="ADDRESS", help="Where the launcher listens.")
@click.option("--trace", type=click.Path(path_type=Path))
def main(config_path: Path | None, overrides: tuple[str, ...], announce: str | None, trace: Path | None) -> None:
    """One rank; started by torchrun."""
    processes.die_with(os.getppid())
    sys.exit(run(config_path, overrides, Announcer(announce), trace))


def run(config_path: Path | None, overrides: tuple[str, ...], announcer: Announcer, trace: Path | None) -> int:
    """Run one rank to its end; returns the exit code. What went wrong is announced and logged as one line."""
    rank = os.environ.get("RANK", "0")
    role: Any = "target" if rank == "0" else "draft"
    try:
        logs.setup(role, int(rank))
        config = load_config(config_path, overrides)
        place = topology.place(config, os.environ)
        Worker(config, place, announcer, trace).run()
    except SsdError as error:
        kind: Any = "config" if isinstance(error, ConfigError) else "runtime"
        log.error("%s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        announcer.say(WorkerFailed(role, int(rank), kind, str(error)))
        return 2 if kind == "config" else 1
    except Exception as error:  # the last resort: the log has the traceback, the user a line
        log.exception("this is a bug")
        announcer.say(WorkerFailed(role, int(rank), "runtime", f"{role} rank {rank}: {type(error).__name__}: {error}"))
        return 1
    finally:
        announcer.close()
    return 0


if __name__ == "__main__":
    main()
