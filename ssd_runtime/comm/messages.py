"""Everything that travels on the control plane, as frozen dataclasses. Knows no bytes (codec.py) and no sockets."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field
from typing import Literal

from ssd_runtime.comm.protocol import FrameShape, VocabularyDigest
from ssd_runtime.config import Mode
from ssd_runtime.speculation.types import Outcome, SamplingParams, TokenLogprob
from ssd_runtime.stalls import Stall

Role = Literal["target", "draft"]
DraftState = Literal["none", "linked", "lost", "relinking"]


# ---- target <-> draft ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """Draft -> target, first: who I am and what I would work with.

    Attributes:
        rank: in the leader's torchrun; 0 for a draft of another, which is given a number.
        instance: random name of this process: one that comes back takes its own place, not another's.
    """

    version: int
    role: Role
    rank: int
    config_digest: str
    vocabulary: VocabularyDigest
    instance: str = ""


@dataclass(frozen=True)
class LinkAddress:
    """Where and under which name the two sides meet for one data link.

    Attributes:
        host, port: of the target's TCPStore.
        session: random name of this engine, so that a stranger on a reused port is not met.
        epoch: counts the links of this engine.
        shape: sizes of the frames.
    """

    host: str
    port: int
    session: str
    epoch: int
    shape: FrameShape


@dataclass(frozen=True)
class Welcome:
    """Target -> draft: accepted; build this link. Control messages count from zero (control_seq) from here on.

    Attributes:
        rank: the draft's number among all ranks of this engine, by which both sides name it.
    """

    link: LinkAddress
    rank: int


@dataclass(frozen=True)
class Refused:
    """The answer to a Hello that does not fit, or to bytes that are no message.

    Attributes:
        again: the same Hello may be welcome later.
    """

    reason: str
    again: bool = False


@dataclass(frozen=True)
class Admit:
    """Target -> draft: a sequence begins, or goes on where this draft has not seen it. Counts towards control_seq.

    Attributes:
        end_tokens: those that end the sequence; told because `params.min_tokens` keeps them from being chosen.
        output_tokens: decided so far; the last one is the bonus token of `outcome`.
        turn: of the next outcome row, which repeats `outcome`; -1 while the prompt is computed.
        outcome: of the last verification; None while the prompt is computed.
    """

    sequence_id: int
    prompt_tokens: tuple[int, ...]
    params: SamplingParams
    mode: Mode
    lookahead: int
    max_tokens: int
    end_tokens: tuple[int, ...] = ()
    output_tokens: tuple[int, ...] = ()
    turn: int = -1
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Finish:
    """Target -> draft: a sequence is over. Counts towards control_seq."""

    sequence_id: int


@dataclass(frozen=True)
class Share:
    """Target -> draft: of the `count` drafts of a sequence you are number `index`. Counts towards control_seq.

    It drafts for every count-th of the outcomes that they would draft for together, beginning with the index-th
    likeliest. A sequence of which nothing was said is its own alone.
    """

    sequence_id: int
    index: int
    count: int


@dataclass(frozen=True)
class Heartbeat:
    """I am alive and have nothing to say."""


@dataclass(frozen=True)
class Shutdown:
    """Stop what you do and leave. Sent by the leader to the draft, and by the launcher to the leader."""

    reason: str


# ---- clients <-> leader ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Generate:
    """Client -> leader: exactly one of prompt, messages and token_ids. None for mode or lookahead: as configured.

    Attributes:
        stream: chunks as tokens come; False: one chunk at the end, which costs the leader less.
        logprobs: log-probabilities of the emitted tokens, with so many alternatives (0 to 20); None for none.
        n: outputs wanted. Output i is what a request with seed `params.seed` + i (modulo 2^64) and n = 1 would get.
    """

    request_id: str
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    mode: Mode | None = None
    lookahead: int | None = None
    ignore_eos: bool = False
    stream: bool = True
    logprobs: int | None = None
    n: int = 1


@dataclass(frozen=True)
class Chunk:
    """Leader -> client: text and tokens that are now final.

    Attributes:
        index: which of the n outputs.
        logprobs: one entry a token, if asked for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    index: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens paid for: nothing that was cut off is counted. The prompt counts once, completions of n outputs add up."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class RequestStatistics:
    """What one request cost. Seconds and milliseconds as named.

    Attributes:
        rounds: verifications after prefill.
        accepted_per_position: entry i counts the rounds that accepted draft token i.
        lookups, hits: of the speculation cache.
        ttft_seconds: from arrival to the first token.
        round_ms: rounds that were hits only, from the start of one verification to the start of the next.
        verify_ms, wait_ms, other_ms: one entry a round.
        draft_step_ms, draft_step_width: one entry a drafting step.
    """

    mode: Mode
    rounds: int = 0
    num_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    lookups: int = 0
    hits: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ttft_seconds: float = 0.0
    round_ms: tuple[float, ...] = ()
    verify_ms: tuple[float, ...] = ()
    wait_ms: tuple[float, ...] = ()
    other_ms: tuple[float, ...] = ()
    draft_step_ms: tuple[float, ...] = ()
    draft_step_width: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Leader -> client: all outputs of the request are complete.

    Attributes:
        finish_reasons: one an output. "stop": EOS or a stop string; "abort": cancelled.
        statistics: of all outputs together.
    """

    request_id: str
    finish_reasons: tuple[Literal["stop", "length", "abort"], ...]
    usage: Usage
    statistics: RequestStatistics

    @property
    def finish_reason(self) -> Literal["stop", "length", "abort"]:
        """Of the first output, which for most requests is the only one."""
        return self.finish_reasons[0]


@dataclass(frozen=True)
class Failed:
    """Leader -> client: "request" is the client's to mend, "engine" is ours, "busy" may be tried again later."""

    request_id: str
    kind: Literal["request", "engine", "busy"]
    reason: str


@dataclass(frozen=True)
class Cancel:
    """Client -> leader: stop working on this request."""

    request_id: str


@dataclass(frozen=True)
class GetStatus:
    """Client -> leader: how are you?"""


@dataclass(frozen=True)
class Status:
    """Leader -> client.

    Attributes:
        draft: "linked" with at least one draft; "relinking" while the link to one is being built; "lost" without.
        cores: role -> CPU cores it is pinned to.
        num_drafts: linked now.
        drafts_lost, drafts_linked: how often, since the start.
        stalls: the longest gaps between two verifications since the start, the longest first.
    """

    state: Literal["loading", "ready", "stopping"]
    draft: DraftState
    target_model: str
    draft_model: str
    mode: Mode
    num_running: int = 0
    num_waiting: int = 0
    cores: dict[str, tuple[int, ...]] = field(default_factory=dict)
    num_drafts: int = 0
    drafts_lost: int = 0
    drafts_linked: int = 0
    stalls: tuple[Stall, ...] = ()


# ---- workers -> launcher ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Worker -> launcher: a phase that takes long (0 to 1)."""

    role: Role
    rank: int
    phase: str
    fraction: float


@dataclass(frozen=True)
class Ready:
    """Leader -> launcher: requests are taken at `address`."""

    address: str
    cores: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Joined:
    """Draft of a torchrun of its own -> launcher: linked, and known to the target by this number.

    Attributes:
        cores: it is pinned to.
        crowded: other drafts of its host are on these cores too.
    """

    rank: int
    cores: tuple[int, ...]
    crowded: bool = False


@dataclass(frozen=True)
class WorkerFailed:
    """Worker -> launcher, last: "config" is the user's to mend (exit code 2), "runtime" is not (exit code 1)."""

    role: Role
    rank: int
    kind: Literal["config", "runtime"]
    reason: str


Message = (
    Hello | Welcome | Refused | Admit | Finish | Share | Heartbeat | Shutdown
    | Generate | Chunk | Finished | Failed | Cancel | GetStatus | Status
    | Progress | Ready | Joined | WorkerFailed
)  # fmt: skip
MESSAGE_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in typing.get_args(Message)}
