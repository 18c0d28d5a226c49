"""What a client and the leader say to each other: requests, text, what they cost, and how the engine is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from ssd_runtime.comm.protocol import CoresByRole, Name, Reason
from ssd_runtime.config import Mode
from ssd_runtime.speculation.types import (
    MOST_ALTERNATIVES,
    MOST_LOOKAHEAD,
    MOST_TOKENS,
    Count,
    Lookahead,
    SamplingParams,
    TokenLogprob,
    Tokens,
)
from ssd_runtime.stalls import Stall

MOST_OUTPUTS = 128
MOST_SAMPLES = 1024  # of one series of measurements

RequestId = Annotated[str, Meta(max_length=256)]
PromptText = Annotated[str, Meta(max_length=5 * MOST_TOKENS)]  # as many bytes as the token ids take on the wire
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Milliseconds = Annotated[float, Meta(ge=-1e12, le=1e12)]  # what is left after others were subtracted may be below 0
DraftState = Literal["none", "linked", "lost", "relinking"]


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Name
    content: PromptText


@dataclass(frozen=True)
class Generate:
    """Client -> leader: exactly one of prompt, messages and token_ids. None for mode or lookahead: as configured.

    Attributes:
        stream: chunks as tokens come; False: few large ones, which cost the leader less.
        logprobs: log-probabilities of the emitted tokens, with so many alternatives (0 to 20); None for none.
        samples: tell the measurements behind each `Series` of the statistics, too.
        n: outputs wanted. Output i is what a request with seed `params.seed` + i (modulo 2^64) and n = 1 would get.
    """

    request_id: RequestId
    prompt: PromptText | None = None
    messages: Annotated[tuple[ChatMessage, ...], Meta(max_length=2**12)] | None = None
    token_ids: Tokens | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: Annotated[int, Meta(ge=1, le=2**31 - 1)] = 128
    stop: Annotated[tuple[Annotated[str, Meta(max_length=2**16)], ...], Meta(max_length=2**8)] = ()
    mode: Mode | None = None
    lookahead: Lookahead | None = None
    ignore_eos: bool = False
    stream: bool = True
    logprobs: Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None = None
    n: Annotated[int, Meta(ge=1, le=MOST_OUTPUTS)] = 1
    samples: bool = False


@dataclass(frozen=True)
class Chunk:
    """Leader -> client: text and tokens that are now final.

    Attributes:
        index: which of the n outputs.
        logprobs: one entry a token, if asked for.
    """

    request_id: RequestId
    text: Annotated[str, Meta(max_length=2**24)]
    token_ids: Tokens
    index: Annotated[int, Meta(ge=0, le=MOST_OUTPUTS - 1)] = 0
    logprobs: Annotated[tuple[TokenLogprob, ...], Meta(max_length=MOST_TOKENS)] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens paid for: nothing that was cut off is counted. The prompt counts once, completions of n outputs add up."""

    prompt_tokens: Count
    completion_tokens: Count


@dataclass(frozen=True)
class Series:
    """Measurements of one kind, in milliseconds. None where there were none.

    Attributes:
        count: how many there were.
        p50, p95, most: of them; the percentiles of more than a thousand are those of evenly spaced ones.
        samples: these, in order (of n outputs one after the other), if the request asked for them.
    """

    count: Count = 0
    mean: Milliseconds | None = None
    p50: Milliseconds | None = None
    p95: Milliseconds | None = None
    most: Milliseconds | None = None
    samples: Annotated[tuple[Milliseconds, ...], Meta(max_length=MOST_SAMPLES)] = ()


@dataclass(frozen=True)
class RequestStatistics:
    """What one request cost. Seconds and milliseconds as named.

    Attributes:
        rounds: verifications after prefill.
        accepted_per_position: entry i counts the rounds that accepted draft token i.
        lookups, hits: of the speculation cache.
        ttft_seconds: from arrival to the first token.
        round_ms: rounds that were hits only, from the start of one verification to the start of the next.
        verify_ms, wait_ms, other_ms: one measurement a round.
        draft_step_ms: one a drafting step.
    """

    mode: Mode
    rounds: Count = 0
    num_tokens: Count = 0
    num_draft_tokens: Count = 0
    num_accepted_tokens: Count = 0
    accepted_per_position: Annotated[tuple[Count, ...], Meta(max_length=MOST_LOOKAHEAD)] = ()
    lookups: Count = 0
    hits: Count = 0
    prefill_seconds: Seconds = 0.0
    decode_seconds: Seconds = 0.0
    ttft_seconds: Seconds = 0.0
    round_ms: Series = Series()
    verify_ms: Series = Series()
    wait_ms: Series = Series()
    other_ms: Series = Series()
    draft_step_ms: Series = Series()


@dataclass(frozen=True)
class Finished:
    """Leader -> client: all outputs of the request are complete.

    Attributes:
        finish_reasons: one an output. "stop": EOS or a stop string; "abort": cancelled.
        statistics: of all outputs together.
    """

    request_id: RequestId
    finish_reasons: Annotated[tuple[Literal["stop", "length", "abort"], ...], Meta(max_length=MOST_OUTPUTS)]
    usage: Usage
    statistics: RequestStatistics

    @property
    def finish_reason(self) -> Literal["stop", "length", "abort"]:
        """Of the first output, which for most requests is the only one."""
        return self.finish_reasons[0]


@dataclass(frozen=True)
class Failed:
    """Leader -> client: "request" is the client's to mend, "engine" is ours, "busy" may be tried again later."""

    request_id: RequestId
    kind: Literal["request", "engine", "busy"]
    reason: Reason


@dataclass(frozen=True)
class Cancel:
    """Client -> leader: stop working on this request."""

    request_id: RequestId


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
    target_model: Annotated[str, Meta(max_length=2**13)]
    draft_model: Annotated[str, Meta(max_length=2**13)]
    mode: Mode
    num_running: Count = 0
    num_waiting: Count = 0
    cores: CoresByRole = field(default_factory=dict)
    num_drafts: Count = 0
    drafts_lost: Count = 0
    drafts_linked: Count = 0
    stalls: Annotated[tuple[Stall, ...], Meta(max_length=2**8)] = ()
