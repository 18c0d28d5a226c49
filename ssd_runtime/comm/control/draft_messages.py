"""What a target and a draft say to each other: who is there, which sequences begin and end, whose outcomes are whose.

In two directions: `Hello` is the draft's, the rest the target's. Of `Admit`, `Finish` and `Portion` both count how many
there were (control_seq).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from ssd_runtime.comm.protocol import FrameShape, Name, Rank, VocabularyDigest
from ssd_runtime.config import Mode
from ssd_runtime.host.cores import Role
from ssd_runtime.speculation.types import Count, Lookahead, NamedTokens, Outcome, SamplingParams, Tokens, Turn


@dataclass(frozen=True)
class Hello:
    """Draft -> target, first: who I am and what I would work with.

    Attributes:
        rank: in the leader's torchrun; 0 for a draft of another, which is given a number.
        instance: random name of this process: one that comes back takes its own place, not another's.
        num_blocks: of its KV pool, for sequences.
    """

    version: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    role: Role
    rank: Rank
    config_digest: Name
    vocabulary: VocabularyDigest
    instance: Name = ""
    num_blocks: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0


@dataclass(frozen=True)
class LinkAddress:
    """Where and under which name the two sides meet for one data link.

    Attributes:
        host, port: where the target listens until this draft has come.
        session: a secret of this link; whoever comes without it is not met.
        epoch: counts the links of this engine.
        shape: sizes of the frames.
    """

    host: Annotated[str, Meta(max_length=256)]
    port: Annotated[int, Meta(ge=0, le=65535)]
    session: Name
    epoch: Count
    shape: FrameShape


@dataclass(frozen=True)
class Welcome:
    """Target -> draft: accepted; build this link. Control messages count from zero (control_seq) from here on.

    Attributes:
        rank: the draft's number among all ranks of this engine, by which both sides name it.
    """

    link: LinkAddress
    rank: Rank


@dataclass(frozen=True)
class Admit:
    """Target -> draft: a sequence begins, or goes on where this draft has not seen it. Counts towards control_seq.

    Attributes:
        end_tokens: those that end the sequence; told because `params.min_tokens` keeps them from being chosen.
        output_tokens: decided so far; the last one is the bonus token of `outcome`.
        turn: of the next outcome row, which repeats `outcome`; -1 while the prompt is computed.
        outcome: of the last verification; None while the prompt is computed.
    """

    sequence_id: Count
    prompt_tokens: Tokens
    params: SamplingParams
    mode: Mode
    lookahead: Lookahead
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    end_tokens: NamedTokens = ()
    output_tokens: Tokens = ()
    turn: Turn = -1
    outcome: Outcome | None = None


@dataclass(frozen=True)
class Finish:
    """Target -> draft: a sequence is over. Counts towards control_seq."""

    sequence_id: Count


@dataclass(frozen=True)
class Portion:
    """Target -> draft: of the `count` drafts of a sequence you are number `index`. Counts towards control_seq.

    It drafts for every count-th of the outcomes that they would draft for together, beginning with the index-th
    likeliest. A sequence of which nothing was said is its own alone.
    """

    sequence_id: Count
    index: Annotated[int, Meta(ge=0, le=2**10)]
    count: Annotated[int, Meta(ge=1, le=2**10)]
