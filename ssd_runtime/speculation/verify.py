"""Verification of a batch: under shared noise, accept while the draft's token equals the target's own.

Lossless because every emitted token is the target's own choice; a speculation only decides how many of them one forward
yields. Under rejection sampling (acceptance.py) that holds at temperature 0 only; above it the tokens have the target's
distribution. Knows no models and no ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_runtime.config import Coupling
from ssd_runtime.speculation.rejection.acceptance import verify_by_rejection
from ssd_runtime.speculation.sampling.ranking import Choice, choose, process_logits, process_rows
from ssd_runtime.speculation.types import Outcome, SamplingParams, Speculation


def tokens_decide(coupling: Coupling, params: SamplingParams) -> bool:
    """Whether the target's own tokens decide what is accepted; if not, probabilities do."""
    return coupling == "shared-noise" or params.temperature == 0.0


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


def verify_by_tokens(chosen: Sequence[int], speculations: Sequence[Speculation]) -> list[Outcome]:
    """The outcome of every speculation, each with one token chosen more than it has, in order."""
    rows = iter(chosen)
    return [verify(list(itertools.islice(rows, len(one.tokens) + 1)), one.tokens) for one in speculations]


def verify_by_logits(
    coupling: Coupling, logits_RV: Tensor, choices: Sequence[Choice], speculations: Sequence[Speculation]
) -> list[Outcome]:
    """The outcome of every speculation, by tokens where these decide.

    Args:
        logits_RV: of the model, for the rows of all choices in order.
        choices: one a speculation, with a row behind each of its tokens and one before.
    """
    outcomes: dict[int, Outcome] = {}
    rows = logits_RV.split([len(choice.rows) for choice in choices])
    by_tokens = [i for i, choice in enumerate(choices) if tokens_decide(coupling, choice.params)]
    if by_tokens:
        same_RV = logits_RV if len(by_tokens) == len(choices) else torch.cat([rows[i] for i in by_tokens])
        chosen = choose(same_RV, [choices[i] for i in by_tokens])
        outcomes = dict(zip(by_tokens, verify_by_tokens(chosen, [speculations[i] for i in by_tokens]), strict=True))
    for i, (choice, speculation) in enumerate(zip(choices, speculations, strict=True)):
        if i not in outcomes:
            z_LV = [process_logits(logits_V, choice.params) for logits_V in process_rows(rows[i], [choice])]
            outcomes[i] = verify_by_rejection(z_LV, speculation, choice.params.seed, choice.text)
    return [outcomes[i] for i in range(len(choices))]
