"""What a target and a draft say to each other: who is there, which sequences begin and end, whose outcomes are whose.

In two directions: `Hello` is the draft's, the rest the target's. Of `Admit`, `Finish` and `Share` both count how many
there were (control_seq).
"""

from __future__ import annotations

from dataclasses import dataclass

from ssd_runtime.comm.protocol import FrameShape, VocabularyDigest
from ssd_runtime.config import Mode
from ssd_runtime.cores import Role
from ssd_runtime.speculation.types import Outcome, SamplingParams


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
