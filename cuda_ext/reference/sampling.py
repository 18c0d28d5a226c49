"""Sampling under shared noise. Shape legend: R rows, V vocabulary, F tokens a row."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_shared_noise(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    count: int = 1,
    first_token: int = 0,
) -> tuple[Tensor, Tensor]:
    """The tokens most likely to be chosen under shared noise, best first; ties go to the lower token.

    Args:
        logits_RV: float32 or bfloat16.
        temperature_R: float64; 0 is greedy, without processors and noise.
        top_k_R: int64; 0 is off. Tokens that tie with the last one kept are kept.
        top_p_R, min_p_R: float64; 1 and 0 are off. Processors apply in this order, each on what the one before left.
        seed_R: int64; the 64 bits of each request's seed.
        position_R: int64; the absolute position of the token to be chosen.
        count: how many tokens a row, at least 1.
        first_token: what the first column stands for, where the logits are a slice of the vocabulary. The noise is that
            of the token; top-k, top-p and min-p look at the slice alone.

    Returns: tokens (int64) and their noised scores (float64), both [R, count]; -1 and -inf where processors leave
    fewer, -1 and NaN all along a row that has a NaN or +inf (after the temperature). Column 0 is the token chosen.
    """
    chosen_RF = torch.full((logits_RV.shape[0], count), -1, dtype=torch.int64, device=logits_RV.device)
    scores_RF = torch.full_like(chosen_RF, -torch.inf, dtype=torch.float64)
    if logits_RV.is_meta:  # no numbers to choose by: for tracing, which asks for shapes and dtypes
        return chosen_RF, scores_RF
    tokens_V = torch.arange(first_token, first_token + logits_RV.shape[1], device=logits_RV.device)
    key_R = _splitmix64(_splitmix64(seed_R) ^ position_R)
    for row, logits_V in enumerate(logits_RV):
        score_V = logits_V.double()
        if temperature_R[row] > 0:
            z_V = logits_V.float() / float(temperature_R[row])
            floor = _processors_floor(z_V, int(top_k_R[row]), float(top_p_R[row]), float(min_p_R[row]))
            score_V = z_V.masked_fill(z_V < floor, -torch.inf).double() + _gumbel_noise(key_R[row], tokens_V)
        if logits_V.numel() and not bool(score_V.max() < torch.inf):
            scores_RF[row] = torch.nan
            continue
        order = torch.sort(score_V, descending=True, stable=True).indices[:count]
        order = order[score_V[order] > -torch.inf]
        chosen_RF[row, : order.numel()] = tokens_V[order]
        scores_RF[row, : order.numel()] = score_V[order]
    return chosen_RF, scores_RF


def _processors_floor(z_V: Tensor, top_k: int, top_p: float, min_p: float) -> float:
    """The smallest processed logit that top-k, top-p and min-p leave."""
    floor = -torch.inf
    if 0 < top_k < z_V.numel():
        floor = float(z_V.topk(top_k).values[-1])
        z_V = z_V.masked_fill(z_V < floor, -torch.inf)
    if top_p < 1.0:
        best_V = z_V.sort(descending=True).values
        reached_V = torch.exp(best_V.double() - torch.logsumexp(z_V.double(), 0)).cumsum(0) >= top_p
        floor = max(floor, float(best_V[reached_V.int().argmax()] if reached_V.any() else best_V[-1]))
    if min_p > 0.0:
        floor = max(floor, float(z_V.max() + torch.log(torch.tensor(min_p))))
    return floor


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64 reads it


def _splitmix64(value: Tensor) -> Tensor:
    """Of 64 bits in an int64: products wrap modulo 2^64, and the masks make arithmetic shifts logical ones."""
    value = value + _GOLDEN
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * -0x40A7B892E31B1A47
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * -0x6B2FB644ECCEEE15
    return value ^ ((value >> 31) & ((1 << 33) - 1))


def _gumbel_noise(key: Tensor, tokens: Tensor) -> Tensor:
    """-log(-log(u)) of the upper half of splitmix64(key + token * golden)."""
    bits = _splitmix64(tokens * _GOLDEN + key)
    uniform = (((bits >> 32) & ((1 << 32) - 1)).double() + 0.5) * 2.0**-32
    return -torch.log(-torch.log(uniform))
