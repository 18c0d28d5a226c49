"""What coupling "rejection" would do at each position of a recorded text, with and without Saguaro sampling: exactly.

The text was sampled from p, and rejection sampling emits p whatever the draft is. So given that token y was emitted, it
was the draft's with chance min(p, q)(y) / p(y), and came from the residual otherwise; and given a rejection, the token
rejected was d with chance max(q - p, 0)(d), normalised, independent of y. So the chances of hits follow without drawing
anything: y is prepared for when it is among the top F of the draft's logits without d.

Knows no models. Shape legend: R rows, V vocabulary, M tokens the draft may sample from (its likeliest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_runtime.speculation.rejection.saguaro import saguaro_logits
from ssd_runtime.speculation.sampling.ranking import process_logits
from ssd_runtime.speculation.types import SamplingParams


@dataclass(frozen=True)
class Rule:
    """How the draft samples: from its `top_m` likeliest tokens, the `fan_out` first of them scaled by C."""

    c: float
    fan_out: int
    top_m: int = 32


@dataclass(frozen=True)
class Variant:
    """One rule at R positions, float64.

    Attributes:
        acceptance_R: chance that a draft token is accepted, sum of min(p, q).
        accepted_R: chance that the token of the text was the draft's, given that it was emitted.
        above_R: chance that a rejected draft token ranks before the token of the text, given a rejection.
    """

    acceptance_R: Tensor
    accepted_R: Tensor
    above_R: Tensor


@dataclass(frozen=True)
class Rejection:
    """All rules at R positions.

    Attributes:
        rank_R: place of the token of the text among the draft's logits.
    """

    rank_R: Tensor
    variants: dict[Rule, Variant]

    @classmethod
    def joined(cls, parts: Sequence[Rejection]) -> Rejection:
        """Several runs of positions as one."""
        variants = {}
        for rule in parts[0].variants:
            columns = zip(*(vars(part.variants[rule]).values() for part in parts), strict=True)
            variants[rule] = Variant(*map(torch.cat, columns))
        return cls(torch.cat([part.rank_R for part in parts]), variants)


def reject(
    target_RV: Tensor, draft_RV: Tensor, chosen_R: Tensor, params: SamplingParams, rules: Sequence[Rule]
) -> Rejection:
    """Both models' logits at R positions, and the tokens of the text there."""
    p_RV = torch.stack([torch.softmax(process_logits(row, params).double(), 0) for row in target_RV])
    z_RV = torch.stack([process_logits(row, params) for row in draft_RV])
    rank_R = (z_RV > z_RV.gather(1, chosen_R[:, None])).sum(1)
    return Rejection(rank_R, {rule: _variant(p_RV, z_RV, chosen_R, rank_R, rule) for rule in rules})


def _variant(p_RV: Tensor, z_RV: Tensor, chosen_R: Tensor, rank_R: Tensor, rule: Rule) -> Variant:
    best = z_RV.topk(min(rule.top_m, z_RV.shape[1]), dim=1)
    q_RM = torch.softmax(saguaro_logits(best.values.double(), rule.c, rule.fan_out), dim=1)
    p_RM = p_RV.gather(1, best.indices)
    acceptance_R = torch.minimum(p_RM, q_RM).sum(1)
    chosen_RM = best.indices == chosen_R[:, None]
    accepted_R = torch.where(chosen_RM, torch.minimum(p_RM, q_RM) / p_RM, 0.0).sum(1)
    rejected_RM = (q_RM - p_RM).clamp(min=0.0)
    rejected_RM = rejected_RM / rejected_RM.sum(1, keepdim=True).clamp(min=1e-300)
    places_M = torch.arange(q_RM.shape[1])
    above_R = torch.where(places_M < rank_R[:, None], rejected_RM, 0.0).sum(1)
    return Variant(acceptance_R, accepted_R, above_R)
