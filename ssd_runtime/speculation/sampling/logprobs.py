"""Log-probabilities of emitted tokens. Knows no requests and no ranks.

They are those of the model's own distribution, the softmax of its raw logits: before penalties, bias, exclusions,
temperature and truncation, as vLLM's `raw_logprobs`. A token that a penalty brought about shows how unlikely it was.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext.ops import to_host
from ssd_runtime.speculation.types import TokenLogprob


def token_logprobs(logits_RV: Tensor, tokens: Sequence[int], count: int) -> tuple[TokenLogprob, ...]:
    """What the model thought of each token.

    Args:
        logits_RV: raw logits; row i decided tokens[i].
        tokens: those emitted.
        count: alternatives wanted, the most probable tokens whether or not the emitted one is among them.
    """
    return tuple(_one(logits_V, token, count) for logits_V, token in zip(logits_RV, tokens, strict=True))


def _one(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    """Row by row, so that the rounding of a sum cannot depend on how many rows there are."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=0)
    if not count:
        return TokenLogprob(token, float(logprobs_V[token]), ())
    least = logprobs_V.topk(min(count, logprobs_V.numel())).values[-1]
    tokens = (logprobs_V >= least).nonzero().squeeze(1)  # in order of ids: among equals the lower one comes first
    order = logprobs_V[tokens].sort(descending=True, stable=True)
    own, best, values = to_host(logprobs_V[token], tokens[order.indices], order.values)
    return TokenLogprob(token, float(own), tuple(zip(best.tolist(), values.tolist(), strict=True))[:count])
