"""The leader's loop: requests in, rounds of the engine, text out. Owns the front door; does not know how it drafts."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Set
from dataclasses import dataclass, field

from ssd_runtime.comm.control import ControlServer
from ssd_runtime.comm.messages import Message, Refused, Shutdown
from ssd_runtime.comm.messages_client import (
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
from ssd_runtime.comm.messages_draft import Hello
from ssd_runtime.config import Config
from ssd_runtime.engine.engine import Engine, Progressed
from ssd_runtime.engine.sequence import Sequence, add_up
from ssd_runtime.errors import ConfigError, RequestError, SsdError
from ssd_runtime.model.tokenizer import Detokenizer, Tokenizer
from ssd_runtime.model.tokenizer_gguf import brief
from ssd_runtime.speculation.types import TokenLogprob
from ssd_runtime.target.door import Door
from ssd_runtime.target.link_speculator import LinkSpeculator
from ssd_runtime.target.requests import RequestReader

log = logging.getLogger(__name__)

IDLE_POLL_S = 0.2
MAIL_S = 0.01  # longest that messages are handled for between two rounds, so that a flood holds up nobody
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
    """

    sequence: Sequence
    ended: bool = False
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass
class _Client:
    """Who asked, for which outputs."""

    identity: bytes
    stream: bool
    outputs: list[_Output]


class Leader:
    """Serves clients.

    Args:
        config: of the run.
        engine: decodes.
        tokenizer: of the target.
        server: the control socket, bound.
        link: the speculator that needs drafts; None if no draft may come.
        door: where drafts come in; None if no draft may come.
        cores: role -> CPU cores, for the status.
        stop: leaves the loop when set.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: Tokenizer,
        server: ControlServer,
        link: LinkSpeculator | None,
        door: Door | None,
        cores: dict[str, tuple[int, ...]],
        stop: Stop,
    ) -> None:
        self._config = config
        self._engine = engine
        self._tokenizer = tokenizer
        self._server = server
        self._link = link
        self._door = door
        self._cores = cores
        self._stop = stop
        self._reader = RequestReader(config, tokenizer)
        self._clients: dict[str, _Client] = {}
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
            unfinished = [(client.identity, request_id) for request_id, client in self._clients.items()]
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
            self._cancel({message.request_id})
        elif isinstance(message, GetStatus):
            self._server.send(identity, self._status())
        elif isinstance(message, Shutdown):
            self._stop.reason = self._stop.reason or message.reason
        elif isinstance(message, Hello):
            self._hello(identity, message)
        else:
            self._server.send(identity, Refused(f"a client does not send {type(message).__name__}"))

    def _hello(self, identity: bytes, message: Hello) -> None:
        if self._door is None:
            self._server.send(identity, Refused("this engine was started without drafts"))
        elif reason := self._door.knock(identity, message):
            log.warning("refused a draft (rank %d): %s", message.rank, reason)

    def _generate(self, identity: bytes, message: Generate) -> None:
        if message.request_id in self._clients:
            self._server.send(identity, Failed(message.request_id, "request", "this request id is in use"))
            return
        queued, limit = self._engine.scheduler.num_queued, self._config.serve.max_queued_requests
        if queued >= limit:  # before any work is done for it
            reason = (
                f"{queued} requests are waiting and serve.max_queued_requests is {limit}: "
                "try again later, or raise the limit"
            )
            self._server.send(identity, Failed(message.request_id, "busy", reason))
            return
        if not self._server.alive(identity):  # it left behind what was not read yet
            return
        try:
            requests = self._reader.read(message)
            # What is refused is refused of the first: they differ in nothing that can be wrong.
            sequences = [self._engine.add(request, Detokenizer(self._tokenizer)) for request in requests]
        except (RequestError, ConfigError) as error:  # a model without a chat template is a ConfigError
            self._server.send(identity, Failed(message.request_id, "request", str(error)))
        except Exception as error:  # whatever it is, it is the failure of this request
            log.exception("a request could not be begun")
            self._engine.cancel({message.request_id})  # those of its outputs that wait already
            reason = f"the request could not be begun: {brief(error) or type(error).__name__}"
            self._server.send(identity, Failed(message.request_id, "engine", reason))
        else:
            self._clients[message.request_id] = _Client(identity, message.stream, list(map(_Output, sequences)))

    def _cancel(self, request_ids: Set[str]) -> None:
        self._engine.cancel(request_ids)
        for request_id in request_ids:
            if (client := self._clients.pop(request_id, None)) is not None:
                self._finish(client)

    def _cancel_the_gone(self) -> None:
        """Now and then look whether clients are still there: those who wait are sent nothing that would show it."""
        now = time.monotonic()
        if now < self._pulse_at:
            return
        self._pulse_at = now + PULSE_S
        identities = {client.identity for client in self._clients.values()}
        gone = {identity for identity in identities if not self._server.alive(identity)}
        if gone:
            left = {request_id for request_id, client in self._clients.items() if client.identity in gone}
            log.info("clients of %d requests are gone; cancelling them", len(left))
            self._engine.cancel(left)
            for request_id in left:
                del self._clients[request_id]

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
        if self._link is None or self._door is None:
            return "none"
        if self._link.drafts.count:
            return "linked"
        return "relinking" if self._door.is_building else "lost"

    # -- results -------------------------------------------------------------------------------------------------

    def _publish(self, progressed: Progressed) -> None:
        sequence, delta = progressed.sequence, progressed.delta
        request_id = sequence.request.request_id
        client = self._clients.get(request_id)
        if client is None:  # it left between two deltas of one round
            return
        output = client.outputs[sequence.request.index]
        output.text += delta.text
        output.token_ids += delta.token_ids
        output.logprobs += delta.logprobs
        output.ended = delta.finish_reason is not None
        if progressed.failure is not None:
            self._fail(client, output, progressed.failure)
        elif all(one.ended for one in client.outputs):
            del self._clients[request_id]
            self._finish(client)
        elif client.stream and not self._send_chunk(client, output):
            log.info("the client of request %s is gone; cancelling it", request_id)
            self._cancel({request_id})

    def _fail(self, client: _Client, output: _Output, reason: str) -> None:
        """One output has failed, and the request with it."""
        request_id = output.sequence.request.request_id
        del self._clients[request_id]
        self._engine.cancel({request_id})
        if client.stream and output.token_ids:
            self._send_chunk(client, output)
        self._server.send(client.identity, Failed(request_id, "engine", reason))

    def _send_chunk(self, client: _Client, output: _Output) -> bool:
        request = output.sequence.request
        tokens, logprobs = tuple(output.token_ids), tuple(output.logprobs)
        chunk = Chunk(request.request_id, output.text, tokens, request.index, logprobs)
        output.text, output.token_ids, output.logprobs = "", [], []
        return self._server.send(client.identity, chunk)

    def _finish(self, client: _Client) -> None:
        """All outputs have ended: send what is left of them, and what they cost."""
        for output in client.outputs:
            if output.token_ids:
                self._send_chunk(client, output)
        sequences = [output.sequence for output in client.outputs]
        reasons = tuple(sequence.finish_reason or "abort" for sequence in sequences)
        usage = Usage(sequences[0].num_prompt, sum(sequence.num_output for sequence in sequences))
        statistics = add_up([sequence.statistics() for sequence in sequences])
        request_id = sequences[0].request.request_id
        self._server.send(client.identity, Finished(request_id, reasons, usage, statistics))
