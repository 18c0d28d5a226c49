"""What a client and the leader say to each other: requests, text, what they cost, and how the engine is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ssd_runtime.config import Mode
from ssd_runtime.speculation.types import SamplingParams, TokenLogprob
from ssd_runtime.stalls import Stall

DraftState = Literal["none", "linked", "lost", "relinking"]


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
