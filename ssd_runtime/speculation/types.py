"""The words of the algorithm as types. No tensors, no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

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

    The order in which they act is that of processors.py, then sampling.py.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_tokens: tuple[int, ...] | None = None
    banned_tokens: tuple[int, ...] = ()
    min_tokens: int = 0

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

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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

    num_accepted: int
    bonus_token: int


@dataclass(frozen=True)
class Proposal:
    """The distribution q that a draft token was sampled from, exactly.

    Attributes:
        tokens: where q is not zero, the likeliest first.
        weights: float32 values, one a token, positive; q is their share in their sum (taken in float64), which is 1 up
            to rounding.
    """

    tokens: tuple[int, ...]
    weights: tuple[float, ...]


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

    sequence_id: int
    turn: int
    outcome: Outcome
    source: Source
    length: int
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Plan:
    """How much to speculate in a round.

    Attributes:
        lookahead: most tokens of a speculation, and of the branches drafted meanwhile; 0: no speculation, no drafting.
        budget: outcomes to draft for, of one sequence on average.
    """

    lookahead: int
    budget: int


@dataclass(frozen=True)
class OutcomeFrame:
    """Target -> draft, at the moment a verification starts (or a just-in-time branch is needed).

    Attributes:
        plan: how much to draft for the sequences in mode `ssd` from now on; None leaves it as it is.
    """

    round: int
    control_seq: int
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

    sequence_id: int
    turn: int
    outcome: Outcome
    tokens: tuple[int, ...]
    proposals: tuple[Proposal, ...] = ()


@dataclass(frozen=True)
class TreeFrame:
    """Draft -> target, pushed while the target still computes; later frames supersede earlier ones.

    Attributes:
        round: of the newest outcome frame the tree knows of.
        step_us: microseconds of the drafting step that grew the tree last.
        step_rows: rows of that step's forward.
    """

    round: int
    branches: tuple[Branch, ...]
    step_us: int = 0
    step_rows: int = 0
