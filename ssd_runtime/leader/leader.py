"""The leader's loop: requests in, rounds of the engine, text out. Owns the front door; does not know how it drafts."""

from __future__ import annotations

import logging
import secrets
import time
from collections import deque
from dataclasses import dataclass, field

from ssd_runtime.comm.control.client_messages import (
    Cancel,
    Chunk,
    DraftState,
    Failed,
    Finished,
    Generate,
    GetStatus,
    Status,
    Usage,
)
from ssd_runtime.comm.control.draft_messages import Hello
from ssd_runtime.comm.control.messages import Message, Refused, Shutdown
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.config import Config
from ssd_runtime.engine.engine import Engine, Progressed
from ssd_runtime.engine.sequence import Delta, Sequence, statistics_of
from ssd_runtime.errors import ConfigError, RequestError, SsdError
from ssd_runtime.leader.acceptor import DraftAcceptor
from ssd_runtime.leader.link_speculator import LinkSpeculator
from ssd_runtime.leader.requests import RequestReader
from ssd_runtime.model.files.fields import brief_error
from ssd_runtime.model.text.tokenizer import Detokenizer, Tokenizer
from ssd_runtime.speculation.types import TokenLogprob

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.2
MAIL_S = 0.01  # longest that messages are handled for between two rounds, so that a flood holds up nobody
MOST_TOKENS_WAITING = 2**23  # of all requests that wait, beyond which none is taken: 36 bytes each
PIECE_BYTES = 16 * 1024  # sent at once to a client that does not stream, about; what it may leave unread is counted
PULSE_S = 0.5  # between two looks at the connections of the clients


@dataclass
class Stop:
    """Set by a signal handler or a client: leave at the next turn of the loop."""

    reason: str = ""

    def __bool__(self) -> bool:
        return bool(self.reason)


@dataclass
class _Output:
    """One output of a request, and what has not been sent of it yet because the client does not stream.

    Attributes:
        ended: its last delta has been taken in.
        size: of what has not been sent, about, in bytes.
    """

    sequence: Sequence
    ended: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    size: int = 0

    def take_in(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.ended = delta.finish_reason is not None
        self.size += len(delta.text.encode()) + 5 * len(delta.token_ids)
        self.size += sum(40 + 16 * len(one.top) for one in delta.logprobs)

    def chunk(self) -> Chunk:
        """What has not been sent; nothing is left then."""
        request = self.sequence.request
        chunk = Chunk(request.request_id, self.text, tuple(self.token_ids), request.index, tuple(self.logprobs))
        self.text, self.token_ids, self.logprobs, self.size = "", [], [], 0
        return chunk


@dataclass
class _Asked:
    """One request: who asked for it, how it is answered, and its outputs. The text that it came with is not kept."""

    identity: bytes
    request_id: str
    stream: bool
    samples: bool
    outputs: list[_Output]

    @property
    def key(self) -> tuple[bytes, str]:
        """Clients choose their ids, so different clients may choose the same."""
        return self.identity, self.request_id

    @property
    def sequences(self) -> list[Sequence]:
        return [output.sequence for output in self.outputs]


class Leader:
    """Serves clients.

    Args:
        config: of the run.
        engine: decodes.
        tokenizer: of the target.
        server: the control socket, bound.
        link: the speculator that needs drafts; None if no draft may come.
        acceptor: where drafts come in; None if no draft may come.
        cores: role -> CPU cores, for the status.
        stop: leaves the loop when set.
        key: with which the engine may be ended from anywhere.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: Tokenizer,
        server: ControlServer,
        link: LinkSpeculator | None,
        acceptor: DraftAcceptor | None,
        cores: dict[str, tuple[int, ...]],
        stop: Stop,
        key: str,
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._server = server
        self._link = link
        self._acceptor = acceptor
        self._cores = cores
        self._stop = stop
        self._key = key
        self._reader = RequestReader(config, tokenizer)
        self._asked: dict[tuple[bytes, str], _Asked] = {}
        self._by_sequence: dict[int, _Asked] = {}
        self._num_refused = 0  # drafts
        self._mail: deque[tuple[bytes, Message]] = deque()  # arrived and not handled yet
        self._pulse_at = time.monotonic() + PULSE_S

    def run(self) -> None:
        """Until `stop` is set or a client asks for shutdown. Requests that still run are told."""
        failure = "the engine failed; see its log"
        try:
            while not self._stop:
                self._read_mail()
                self._cancel_the_gone()
                self._engine.watch.lap("messages")
                if self._link is not None:  # drafts come and go whatever the running requests ask for
                    self._link.check()
                self._engine.watch.lap("drafts")
                if self._engine.has_work:
                    for progressed in self._engine.step():
                        self._publish(progressed)
                    self._engine.watch.lap("publish")
                else:
                    self._engine.check()
                    self._engine.watch.begin()
        except SsdError as error:
            failure = str(error)
            raise
        finally:
            reason = f"the request was not finished: {self._stop.reason or failure}"
            unfinished = list(self._asked)
            unfinished += [(who, message.request_id) for who, message in self._mail if isinstance(message, Generate)]
            for identity, request_id in unfinished:
                self._server.send(identity, Failed(request_id, "engine", reason))

    # -- messages ------------------------------------------------------------------------------------------------

    def _read_mail(self) -> None:
        """Handle what has arrived; while requests run no longer than `MAIL_S`, the rest after the next round."""
        if not self._mail:
            self._mail.extend(self._server.poll(0.0 if self._engine.has_work else IDLE_POLL_S))
        until = time.monotonic() + MAIL_S
        while self._mail and not self._stop:
            self._handle(*self._mail.popleft())
            if self._engine.has_work and time.monotonic() > until:
                break

    def _handle(self, identity: bytes, message: Message) -> None:
        if isinstance(message, Generate):
            self._generate(identity, message)
        elif isinstance(message, Cancel):
            self._cancel(identity, message.request_id)
        elif isinstance(message, GetStatus):
            self._server.send(identity, self._status())
        elif isinstance(message, Shutdown):
            self._shutdown(identity, message)
        elif isinstance(message, Hello):
            self._hello(identity, message)
        else:
            self._server.send(identity, Refused(f"a client does not send {type(message).__name__}"))

    def _hello(self, identity: bytes, message: Hello) -> None:
        if self._acceptor is None:
            self._server.send(identity, Refused("this engine was started without drafts"))
        elif reason := self._acceptor.knock(identity, message):
            self._num_refused += 1
            if self._num_refused.bit_count() == 1:  # 1, 2, 4, 8...: a flood of them is not to flood the log
                log.warning("refused a draft (rank %d, %d so far): %s", message.rank, self._num_refused, reason)

    def _generate(self, identity: bytes, message: Generate) -> None:
        if (identity, message.request_id) in self._asked:  # no Failed: for the client that would end the first one
            reason = f"the id of a request that still runs was given to another: {message.request_id}"
            self._server.send(identity, Refused(reason))
            return
        if busy := self._busy():  # before any work is done for it
            self._server.send(identity, Failed(message.request_id, "busy", busy))
            return
        if not self._server.alive(identity):  # it left behind what was not read yet
            return
        sequences: list[Sequence] = []
        try:
            # What is refused is refused of the first: they differ in nothing that can be wrong.
            for request in self._reader.read(message):
                sequences.append(self._engine.add(request, Detokenizer(self._tokenizer)))
        except (RequestError, ConfigError) as error:  # a model without a chat template is a ConfigError
            self._server.send(identity, Failed(message.request_id, "request", str(error)))
        except Exception as error:  # whatever it is, it is the failure of this request
            log.exception("a request could not be begun")
            self._engine.cancel(sequences)  # those of its outputs that wait already
            reason = f"the request could not be begun: {brief_error(error) or type(error).__name__}"
            self._server.send(identity, Failed(message.request_id, "engine", reason))
        else:
            asked = _Asked(identity, message.request_id, message.stream, message.samples, list(map(_Output, sequences)))
            self._asked[asked.key] = asked
            self._by_sequence |= {sequence.sequence_id: asked for sequence in sequences}

    def _busy(self) -> str | None:
        """Why nothing more may wait now."""
        scheduler, limit = self._engine.scheduler, self._config.serve.max_queued_requests
        if scheduler.num_queued >= limit:
            return (
                f"{scheduler.num_queued} requests are waiting and serve.max_queued_requests is {limit}: "
                "try again later, or raise the limit"
            )
        if scheduler.num_tokens_waiting > MOST_TOKENS_WAITING:
            return f"the requests that wait have {scheduler.num_tokens_waiting} tokens together: try again later"
        return None

    def _cancel(self, identity: bytes, request_id: str) -> None:
        """The client's wish. A request that is over, or another client's, is none of its own that run."""
        if (asked := self._asked.get((identity, request_id))) is not None:
            self._engine.cancel(asked.sequences)
            self._finish(asked)

    def _forget(self, asked: _Asked) -> None:
        del self._asked[asked.key]
        for sequence in asked.sequences:
            del self._by_sequence[sequence.sequence_id]

    def _cancel_the_gone(self) -> None:
        """Now and then look whether clients are still there: those who wait are sent nothing that would show it."""
        now = time.monotonic()
        if now < self._pulse_at:
            return
        self._pulse_at = now + PULSE_S
        identities = {asked.identity for asked in self._asked.values()}
        for identity in identities:
            if not self._server.alive(identity):
                self._abandon(identity)

    def _abandon(self, identity: bytes) -> None:
        """This client is gone: nothing more is done for it."""
        left = [asked for asked in self._asked.values() if asked.identity == identity]
        log.info("the client of %d requests is gone; cancelling them", len(left))
        for asked in left:
            self._engine.cancel(asked.sequences)
            self._forget(asked)

    def _shutdown(self, identity: bytes, message: Shutdown) -> None:
        has_key = secrets.compare_digest(message.key.encode(), self._key.encode())
        if not (has_key or self._config.serve.allow_shutdown or self._server.is_local(identity)):
            log.warning("refused to end the engine for a client of another host")
            self._server.send(identity, Refused("it is ended from its own host, or with serve.allow_shutdown = true"))
            return
        self._stop.reason = self._stop.reason or message.reason
        self._server.send(identity, self._status())

    def _status(self) -> Status:
        drafts = None if self._link is None else self._link.drafts
        return Status(
            state="stopping" if self._stop else "ready",
            draft=self._draft_state(),
            target_model=self._config.target.model,
            draft_model=self._config.draft.model,
            mode=self._config.speculation.mode,
            num_running=len(self._engine.scheduler.running),
            num_waiting=len(self._engine.scheduler.waiting),
            cores=self._cores,
            num_drafts=drafts.count if drafts else 0,
            drafts_lost=drafts.num_lost if drafts else 0,
            drafts_linked=drafts.num_linked if drafts else 0,
            stalls=self._engine.watch.longest,
        )

    def _draft_state(self) -> DraftState:
        if self._link is None or self._acceptor is None:
            return "none"
        if self._link.drafts.count:
            return "linked"
        return "relinking" if self._acceptor.is_building else "lost"

    # -- results -------------------------------------------------------------------------------------------------

    def _publish(self, progressed: Progressed) -> None:
        sequence, delta = progressed.sequence, progressed.delta
        asked = self._by_sequence.get(sequence.sequence_id)
        if asked is None:  # its client left between two deltas of one round
            return
        output = asked.outputs[sequence.request.index]
        output.take_in(delta)
        if progressed.failure is not None:
            self._fail(asked, output, progressed.failure)
            return
        if all(one.ended for one in asked.outputs):
            self._finish(asked)
            return
        is_due = asked.stream or output.size > PIECE_BYTES
        if is_due and not self._server.send(asked.identity, output.chunk()):
            self._abandon(asked.identity)

    def _fail(self, asked: _Asked, output: _Output, reason: str) -> None:
        """One output has failed, and the request with it."""
        self._forget(asked)
        self._engine.cancel(asked.sequences)
        if asked.stream and output.token_ids:
            self._server.send(asked.identity, output.chunk())
        self._server.send(asked.identity, Failed(asked.request_id, "engine", reason))

    def _finish(self, asked: _Asked) -> None:
        """All outputs have ended: send what is left of them, and what they cost."""
        self._forget(asked)
        for output in asked.outputs:
            if output.token_ids:
                self._server.send(asked.identity, output.chunk())
        sequences = asked.sequences
        reasons = tuple(sequence.finish_reason or "abort" for sequence in sequences)
        usage = Usage(sequences[0].num_prompt, sum(sequence.num_output for sequence in sequences))
        statistics = statistics_of(sequences, samples=asked.samples)
        self._server.send(asked.identity, Finished(asked.request_id, reasons, usage, statistics))
