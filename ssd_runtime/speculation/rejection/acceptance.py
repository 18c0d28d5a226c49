"""Verification by rejection sampling: accept x with probability min(1, p(x) / q(x)), else draw from the residual.

    y = x                         if u < p(x) / q(x)
    y ~ max(p - q, 0) / norm      otherwise
    y ~ p                         after all tokens were accepted (the bonus), or where nothing was speculated

Leviathan, Kalman, Matias, "Fast inference from transformers via speculative decoding" (ICML 2023), Theorem 3.5; Chen et
al. (arXiv 2302.01318). Each emitted token is distributed as p, whatever q is, because q(x) min(1, p(x)/q(x)) +
(1 - accepted) residual(x) = p(x) -- provided that x really is a draw from the q used here, independent of u and of the
residual's noise (noise.py says why it is). p is the target's distribution after every logits processor. q is what the
draft sent: truncated to its top m, renormalised, modified by Saguaro's C. A token that was not sampled (a greedy draft,
an n-gram) has a point mass for q.

The `..._oracle` functions are the definition over whole vectors in float64. `verify_by_rejection` evaluates q on its
support only and noise only where it can win. Knows no models and no ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext.ops import to_host
from ssd_runtime.speculation.noise import MAX_NOISE, Stream, extend_text, gumbel_noise, text_key, uniform_noise
from ssd_runtime.speculation.types import NO_TOKEN, Outcome, Proposal, Speculation

_HEAD = 64  # tokens whose noise is evaluated first, for a bound on the winner


def point_mass(token: int) -> Proposal:
    """What a token counts as sampled from that was not sampled."""
    return Proposal((token,), (1.0,))


def dense(proposal: Proposal, vocab_size: int) -> Tensor:
    """q over the whole vocabulary, float64 [V], summing to 1."""
    q_V = torch.zeros(vocab_size, dtype=torch.float64)
    q_V[list(proposal.tokens)] = torch.tensor(proposal.weights, dtype=torch.float64)
    return q_V / q_V.sum()


def acceptance_oracle(p_V: Tensor, q_V: Tensor, token: int) -> float:
    """The chance that `token`, sampled from q, is accepted."""
    return min(1.0, float(p_V[token] / q_V[token]))


def residual_oracle(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The distribution after a rejection, float64 [V]. Where p = q nothing is ever rejected; p then."""
    rest_V = (p_V - q_V).clamp(min=0.0)
    total = rest_V.sum()
    return rest_V / total if total > 0 else p_V


def draw_oracle(p_V: Tensor, key: int) -> int:
    """A token of distribution p by noise: argmax_v [ log p_v + g(key, v) ]."""
    tokens_V = torch.arange(p_V.numel())
    return int((p_V.double().log() + gumbel_noise(key, tokens_V)).argmax())


def verify_oracle(z_LV: Tensor, speculation: Speculation, seed: int, text: int) -> Outcome:
    """`verify_by_rejection` by definition."""
    p_LV = torch.softmax(z_LV.double(), dim=1)
    proposals = speculation.proposals or tuple(map(point_mass, speculation.tokens))
    for k, (token, proposal) in enumerate(zip(speculation.tokens, proposals, strict=True)):
        q_V = dense(proposal, z_LV.shape[1])
        if uniform_noise(text_key(seed, text, Stream.ACCEPTANCE)) >= acceptance_oracle(p_LV[k], q_V, token):
            return Outcome(k, draw_oracle(residual_oracle(p_LV[k], q_V), text_key(seed, text, Stream.CHOICE)))
        text = extend_text(text, (token,))
    return Outcome(len(speculation.tokens), draw_oracle(p_LV[-1], text_key(seed, text, Stream.CHOICE)))


def verify_by_rejection(z_LV: Sequence[Tensor] | Tensor, speculation: Speculation, seed: int, text: int) -> Outcome:
    """The outcome (k, t*) of verifying one speculation of one sequence.

    Args:
        z_LV: processed logits after the bonus token and after each speculated one, len(speculation.tokens) + 1 rows;
            excluded tokens are -inf. Rows behind a rejection are not looked at; at one that is looked at and leaves
            nothing to choose (NaN, +inf, nothing but -inf) the bonus token is NO_TOKEN.
        speculation: its tokens, and what they were sampled from.
        seed: of the request.
        text: hash of the tokens before the first speculated one (noise.extend_text).
    """
    tokens = speculation.tokens
    assert len(z_LV) == len(tokens) + 1
    proposals = speculation.proposals or tuple(map(point_mass, tokens))
    for k, (token, proposal) in enumerate(zip(tokens, proposals, strict=True)):
        z_V = z_LV[k].double()
        norm = torch.logsumexp(z_V, dim=0)
        support_M = torch.tensor(proposal.tokens, device=z_V.device)
        q_M = torch.tensor(proposal.weights, dtype=torch.float64, device=z_V.device)
        q_M = q_M / q_M.sum()
        inside = [index for index, one in enumerate(proposal.tokens) if one < len(z_V)]
        if len(inside) < len(proposal.tokens):  # the draft's padding: p is 0 there
            support_M, q_M = support_M[inside], q_M[inside]
        p_M = (z_V[support_M] - norm).exp()
        index = inside.index(proposal.tokens.index(token))
        q, p, whole = map(float, to_host(q_M[index], p_M[index], norm))
        if not math.isfinite(whole):
            return Outcome(k, NO_TOKEN)
        # Not u < p / q, which is what it is: u may be 0 where p is 0, and q may be tiny.
        if uniform_noise(text_key(seed, text, Stream.ACCEPTANCE)) * q >= p:
            rest_V = z_V.index_copy(0, support_M, (p_M - q_M).clamp(min=0.0).log() + norm)
            return Outcome(k, _draw(rest_V if bool(rest_V.max() > -torch.inf) else z_V, seed, text))
        text = extend_text(text, (token,))
    return Outcome(len(tokens), _draw(z_LV[-1].double(), seed, text))


def _draw(z_V: Tensor, seed: int, text: int) -> int:
    """`draw_oracle` of softmax(z), with noise only for tokens that could win; z is float64. NO_TOKEN if z is none."""
    key = text_key(seed, text, Stream.CHOICE)
    head = z_V.topk(min(_HEAD, z_V.numel()))
    bound = float((head.values + gumbel_noise(key, head.indices)).max())
    if not math.isfinite(bound):  # to topk, NaN is the greatest of all
        return NO_TOKEN
    tokens = (z_V >= bound - MAX_NOISE - 1e-9 * (abs(bound) + MAX_NOISE)).nonzero().squeeze(1)
    return int(tokens[(z_V[tokens] + gumbel_noise(key, tokens)).argmax()])
