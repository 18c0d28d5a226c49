"""What the draft does under coupling "rejection": rank bonus candidates by logits, and sample its own next token.

    q = softmax over the m largest processed logits, scaled by Saguaro's C where asked for
    x = argmax_v [ log q_v + g_v ]

The noise g is of the stream PROPOSAL, keyed by the text so far. q leaves here as the float32 numbers that x was sampled
from; the target verifies against exactly these. Knows no models and no ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cuda_ext.ops import to_host
from ssd_runtime.speculation.noise import Stream, gumbel_noise, text_key
from ssd_runtime.speculation.rejection.saguaro import saguaro_logits
from ssd_runtime.speculation.sampling.ranking import (
    Choice,
    Ranking,
    process_logits,
    process_rows,
    rank_tokens,
)
from ssd_runtime.speculation.types import Proposal


@dataclass(frozen=True)
class ProposalRule:
    """How a draft token is sampled.

    Attributes:
        top_m: most tokens with a chance. 1 is a greedy draft: nothing is sampled and q is a point mass.
        saguaro_c, saguaro_f: C and F of Saguaro sampling; C = 1 is off.
    """

    top_m: int = 32
    saguaro_c: float = 1.0
    saguaro_f: int = 4


def propose_oracle(z_V: Tensor, rule: ProposalRule, key: int) -> tuple[int, Proposal]:
    """One draft token and its q by definition, over the whole vocabulary in float64.

    Args:
        z_V: processed logits, excluded tokens -inf.
    """
    order = torch.sort(z_V.double(), descending=True, stable=True).indices[: rule.top_m]
    kept_V = torch.full_like(z_V, -torch.inf, dtype=torch.float64)
    kept_V[order] = z_V.double()[order]
    q_V = torch.softmax(saguaro_logits(kept_V, rule.saguaro_c, rule.saguaro_f), dim=0).float()
    score_V = q_V.double().log() + gumbel_noise(key, torch.arange(z_V.numel()))
    support = [token for token in order.tolist() if q_V[token] > 0]
    return int(score_V.argmax()), Proposal(tuple(support), tuple(q_V[support].tolist()))


def propose_tokens(logits_RV: Tensor, choices: Sequence[Choice], count: int, rule: ProposalRule) -> list[Ranking]:
    """`rank_tokens` for coupling "rejection".

    Rows at temperature 0 are ranked as ever: their draft token is the best one. The others are ranked by their
    processed logits, without noise, and have a draft token sampled from q.

    Args:
        logits_RV: of the model, a row a choice, any float dtype.
        choices: of one row each; `text` is that up to and including the row's token.
        count: how many tokens are ranked, at least 1.
    """
    ranked: dict[int, Ranking] = {}
    greedy = [row for row, choice in enumerate(choices) if choice.params.temperature == 0.0]
    if greedy:
        rankings = rank_tokens(logits_RV[greedy], [choices[row] for row in greedy], count)
        ranked.update(zip(greedy, rankings, strict=True))
    rows = [row for row, choice in enumerate(choices) if choice.params.temperature > 0.0]
    if rows:
        sampled, processed_RV = [choices[row] for row in rows], process_rows(logits_RV, choices)
        z_SV = torch.stack([process_logits(processed_RV[row], choices[row].params) for row in rows])
        keys = [text_key(one.params.seed, one.text, Stream.PROPOSAL) for one in sampled]
        temperatures = [one.params.temperature for one in sampled]
        ranked.update(zip(rows, _propose(z_SV, keys, temperatures, count, rule), strict=True))
    return [ranked[row] for row in range(len(choices))]


def _propose(
    z_SV: Tensor, keys: Sequence[int], temperatures: Sequence[float], count: int, rule: ProposalRule
) -> list[Ranking]:
    best = z_SV.topk(min(max(count, rule.top_m), z_SV.shape[1]), dim=1)
    kept_SM = best.values[:, : rule.top_m].double()
    tokens_SM = best.indices[:, : rule.top_m]
    q_SM = torch.softmax(saguaro_logits(kept_SM, rule.saguaro_c, rule.saguaro_f), dim=1).float()
    keys_S1 = torch.tensor(keys, dtype=torch.int64, device=z_SV.device)[:, None]
    index_S1 = (q_SM.double().log() + gumbel_noise(keys_S1, tokens_SM)).argmax(dim=1, keepdim=True)
    found = to_host(tokens_SM.gather(1, index_S1).squeeze(1), q_SM, best.indices, best.values)
    rankings = []
    for row, (sampled, weights, tokens, scores) in enumerate(zip(*(each.tolist() for each in found), strict=True)):
        if not math.isfinite(scores[0]):  # nothing to choose, as in ranking.py
            rankings.append(Ranking((), ()))
            continue
        left = sum(score > -torch.inf for score in scores[:count])  # processors may leave fewer
        margins = tuple((scores[0] - score) * temperatures[row] for score in scores[:left])
        ranking = Ranking(tuple(tokens[:left]), margins)
        if rule.top_m > 1:
            # q is of the first ones ranked.
            pairs = [(token, q) for token, q in zip(tokens, weights, strict=False) if q > 0.0]
            proposal = Proposal(tuple(token for token, _ in pairs), tuple(q for _, q in pairs))
            ranking = Ranking(ranking.tokens, ranking.margins, sampled, proposal)
        rankings.append(ranking)
    return rankings
