"""The words of the algorithm as types, with the range of each number: they come from other processes. No tensors, no
I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated

from msgspec import Meta

MOST_TOKENS = 2**20  # of one sequence, whatever engine.max_model_len says
MOST_LOOKAHEAD = 2**12
MOST_ALTERNATIVES = 20  # told with the log-probability of an emitted token

MOST_COUNT = 2**48  # of what is counted over the life of an engine: sums of them are far from 2^63
MOST_TOKEN = 2**31 - 1
MOST_SEED = 2**64 - 1
MOST_STEP_US = 3_600_000_000
MOST_STEP_ROWS = 2**24

Token = Annotated[int, Meta(ge=0, le=MOST_TOKEN)]
Count = Annotated[int, Meta(ge=0, le=MOST_COUNT)]
Turn = Annotated[int, Meta(ge=-1, le=MOST_COUNT)]
Lookahead = Annotated[int, Meta(ge=0, le=MOST_LOOKAHEAD)]
Bias = Annotated[float, Meta(ge=-100, le=100)]  # as OpenAI's
Tokens = Annotated[tuple[Token, ...], Meta(max_length=MOST_TOKENS)]
NamedTokens = Annotated[tuple[Token, ...], Meta(max_length=2**16)]
Logprob = Annotated[float, Meta(ge=-1e39, le=1)]  # whatever float32 logits make of it, rounding included

# Noise is between -3.2 and 22.9, so at this temperature it decides between logits that differ by less than 3e-4 only,
# and logits over it are far from the end of float32. vLLM draws the line at the same place.
GREEDY_UP_TO = 1e-5
NO_TOKEN = -1  # where a token should have been chosen: the logits are NaN or infinite, or nothing is left of them


@dataclass(frozen=True)
class SamplingParams:
    """How a token is chosen from the target's logits.

    Attributes:
        temperature: 0 is greedy (no noise); what is above 0 and at most `GREEDY_UP_TO` becomes 0.
        top_k: keep the k most probable tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches top_p; 1 keeps all.
        min_p: keep tokens at least min_p times as probable as the best; 0 keeps all.
        seed: key of the shared noise, together with position and token.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
        presence_penalty: subtracted from the logits of tokens in the output.
        frequency_penalty: the same, times how often the token is there.
        logit_bias: (token, what is added to its logit), each token once.
        allowed_tokens: nothing else is chosen; None allows all.
        banned_tokens: never chosen.
        min_tokens: the tokens that end a sequence are not chosen before so many. A stop string still ends it.

    The order in which they act is that of processors.py, then ranking.py.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.0
    top_k: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: Annotated[int, Meta(ge=0)] = 0  # up to MOST_SEED, which no message can exceed
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[tuple[tuple[Token, Bias], ...], Meta(max_length=2**12)] = ()
    allowed_tokens: NamedTokens | None = None
    banned_tokens: NamedTokens = ()
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] = 0

    def __post_init__(self) -> None:
        # Here, so that no reader meets a temperature that its arithmetic cannot bear.
        if 0.0 < self.temperature <= GREEDY_UP_TO:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True)
class TokenLogprob:
    """What the target's own distribution, before every processor, says of an emitted token.

    Attributes:
        token: the one emitted.
        logprob: natural logarithm of its probability.
        top: (token, logprob) of the most probable ones, best first, as many as were asked for.
    """

    token: Token
    logprob: Logprob
    top: Annotated[tuple[tuple[Token, Logprob], ...], Meta(max_length=MOST_ALTERNATIVES)] = ()


class Source(IntEnum):
    """Where the speculation being verified came from."""

    NONE = 0  # nothing is verified beyond the bonus token
    DRAFT = 1  # a prefix of the draft's own branch for this outcome: the draft knows the tokens
    NGRAM = 2  # found in the text so far: the draft must be told the tokens
    PENDING = 3  # a miss: the target waits for the draft's just-in-time branch; a second frame follows


@dataclass(frozen=True)
class Outcome:
    """What a verification decided for one sequence: (k, t*) of the paper.

    Attributes:
        num_accepted: k, draft tokens accepted.
        bonus_token: t*, the token the target itself chose next; NO_TOKEN where it could choose none.
    """

    num_accepted: Lookahead
    bonus_token: Token


@dataclass(frozen=True)
class Proposal:
    """The distribution q that a draft token was sampled from, exactly.

    Attributes:
        tokens: where q is not zero, the likeliest first.
        weights: float32 values, one a token, positive; q is their share in their sum (taken in float64), which is 1 up
            to rounding.
    """

    tokens: tuple[Token, ...]
    weights: tuple[Annotated[float, Meta(gt=0, le=1.001)], ...]


@dataclass(frozen=True)
class Speculation:
    """The 0..K draft tokens that the target verifies in one forward.

    Attributes:
        proposals: what each token was sampled from; () if none was sampled (greedy drafts, n-grams, shared noise).
    """

    tokens: tuple[int, ...] = ()
    source: Source = Source.NONE
    proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True)
class OutcomeRow:
    """One sequence's line of an `OutcomeFrame`.

    Attributes:
        sequence_id: unique for the life of the engine.
        turn: how many verifications of this sequence came before the one now starting (0: the first after prefill).
        outcome: of verification `turn - 1`; turn 0 carries Outcome(0, first token).
        source, length: of the speculation now being verified.
        tokens: of that speculation. Told whatever the source: another draft, or this one before it was lost and came
            back, may have drafted them.
    """

    sequence_id: Count
    turn: Turn
    outcome: Outcome
    source: Source
    length: Lookahead
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How much to speculate in a round.

    Attributes:
        lookahead: most tokens of a speculation, and of the branches drafted meanwhile; 0: no speculation, no drafting.
        budget: outcomes to draft for, of one sequence on average.
    """

    lookahead: Lookahead
    budget: Count


@dataclass(frozen=True)
class OutcomeFrame:
    """Target -> draft, at the moment a verification starts (or a just-in-time branch is needed).

    Attributes:
        plan: how much to draft for the sequences in mode `ssd` from now on; None leaves it as it is.
    """

    round: Count
    control_seq: Count
    rows: tuple[OutcomeRow, ...]
    plan: Plan | None = None


@dataclass(frozen=True)
class Branch:
    """A pre-drafted speculation for one outcome of verification `turn` of a sequence.

    Attributes:
        turn: the verification whose outcome this branch answers; -1 is the prefill.
        tokens: none where a draft only says that it has caught up with a sequence.
        proposals: what each token was sampled from; () if none was sampled.
    """

    sequence_id: Count
    turn: Turn
    outcome: Outcome
    tokens: tuple[Token, ...]
    proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True)
class TreeFrame:
    """Draft -> target, pushed while the target still computes; later frames supersede earlier ones.

    Attributes:
        round: of the newest outcome frame the tree knows of.
        step_us: microseconds of the drafting step that grew the tree last.
        step_rows: rows of that step's forward.
    """

    round: Count
    branches: tuple[Branch, ...]
    step_us: Annotated[int, Meta(ge=0, le=MOST_STEP_US)] = 0
    step_rows: Annotated[int, Meta(ge=0, le=MOST_STEP_ROWS)] = 0
