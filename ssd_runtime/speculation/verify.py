"""Verification of a batch: under shared noise, accept while the draft's token equals the target's own.

Lossless because every emitted token is the target's own choice; a speculation only decides how many of them one forward
yields. Under rejection sampling (acceptance.py) that holds at temperature 0 only; above it the tokens have the target's
distribution. Knows no models and no ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_runtime.config import Coupling
from ssd_runtime.speculation.rejection.acceptance import verify_by_rejection
from ssd_runtime.speculation.sampling.choice import Choice, choose, processed
from ssd_runtime.speculation.sampling.processors import LogitsProcessors
from ssd_runtime.speculation.sampling.ranking import process_logits
from ssd_runtime.speculation.types import Outcome, SamplingParams, Speculation


@dataclass(frozen=True)
class Claim:
    """A speculation to be verified.

    Attributes:
        params: of the request.
        position: of the first speculated token in the sequence; of the bonus token if there is none.
        text: hash of the tokens before it (noise.py); only rejection sampling looks at it.
        processors: of the sequence; None if it has none.
    """

    params: SamplingParams
    position: int
    speculation: Speculation
    text: int = 0
    processors: LogitsProcessors | None = None

    @property
    def num_rows(self) -> int:
        return len(self.speculation.tokens) + 1

    @property
    def choice(self) -> Choice:
        """The target's own tokens at its rows."""
        return Choice(self.params, self.position, range(self.num_rows), self.speculation.tokens, self.processors)

    def is_settled_by_tokens(self, coupling: Coupling) -> bool:
        """Whether the target's own tokens decide; if not, probabilities do."""
        return coupling == "shared-noise" or self.params.temperature == 0.0


def verify(chosen: Sequence[int], speculation: Sequence[int]) -> Outcome:
    """The outcome (k, t*) of verifying one speculation under shared noise; t* is NO_TOKEN where the target has none.

    Args:
        chosen: the target's own tokens after the bonus token and after each speculated one; len(speculation) + 1.
        speculation: the draft's tokens.
    """
    assert len(chosen) == len(speculation) + 1
    num_accepted = 0
    while num_accepted < len(speculation) and speculation[num_accepted] == chosen[num_accepted]:
        num_accepted += 1
    return Outcome(num_accepted, chosen[num_accepted])


def verify_by_tokens(chosen: Sequence[int], claims: Sequence[Claim]) -> list[Outcome]:
    """The outcome of every claim, all of them settled by the target's own tokens, `num_rows` a claim in order."""
    rows = iter(chosen)
    return [verify(list(itertools.islice(rows, claim.num_rows)), claim.speculation.tokens) for claim in claims]


def verify_claims(coupling: Coupling, logits_RV: Tensor, claims: Sequence[Claim]) -> list[Outcome]:
    """The outcome of every claim.

    Args:
        logits_RV: of the model, `num_rows` rows a claim, in order.
    """
    rows = logits_RV.split([claim.num_rows for claim in claims])
    by_tokens = [i for i, claim in enumerate(claims) if claim.is_settled_by_tokens(coupling)]
    outcomes: dict[int, Outcome] = {}
    if by_tokens:
        same_RV = logits_RV if len(by_tokens) == len(claims) else torch.cat([rows[i] for i in by_tokens])
        settled = [claims[i] for i in by_tokens]
        chosen = choose(same_RV, [claim.choice for claim in settled])
        outcomes = dict(zip(by_tokens, verify_by_tokens(chosen, settled), strict=True))
    for i, claim in enumerate(claims):
        if i not in outcomes:
            z_LV = [process_logits(logits_V, claim.params) for logits_V in processed(rows[i], [claim.choice])]
            outcomes[i] = verify_by_rejection(z_LV, claim.speculation, claim.params.seed, claim.text)
    return [outcomes[i] for i in range(len(claims))]
