"""Shared noise: Gumbel noise from a counter-based hash of (seed, position, token).

Knows no logits and no ranks. Integer arithmetic only up to the last step, so that every device gets the same bits:
the same (seed, position, token) gives the same noise at the target, at the draft, in AR, SD and SSD, in any batch.
Source: the Gumbel-max coupling of Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant
speculative decoding"; the hash is splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_UNIFORM_BITS = 32

# u = (h + 1/2) / 2^32 lies strictly inside (0, 1), so the noise is bounded; sparse evaluation rests on this bound.
MAX_NOISE = -math.log(-math.log1p(-(2.0 ** -(_UNIFORM_BITS + 1))))
MIN_NOISE = -math.log(-math.log(2.0 ** -(_UNIFORM_BITS + 1)))


def signed(value: int) -> int:
    """The same 64 bits as torch's int64 reads them."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def splitmix64(value: int) -> int:
    """One splitmix64 finalisation of an unsigned 64-bit integer."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)


def noise_key(seed: int, position: int) -> int:
    """The 64-bit key of one position of one request, as a signed integer that fits an int64 tensor."""
    return signed(splitmix64(splitmix64(seed & _MASK) ^ (position & _MASK)))


def gumbel_noise(key: int | Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise g(s, i, v) of tokens under `noise_key(s, i)`.

    Args:
        key: one key, or an int64 tensor that broadcasts against `tokens`.
        tokens: int64 tensor of token ids, any shape.

    Returns:
        float64 tensor of the broadcast shape, between MIN_NOISE and MAX_NOISE.
    """
    # int64 products wrap modulo 2^64 on every device; shifts are arithmetic, hence the masks.
    bits = tokens * signed(_GOLDEN) + key + signed(_GOLDEN)
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * signed(_MIX_1)
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * signed(_MIX_2)
    bits = bits ^ ((bits >> 31) & ((1 << 33) - 1))
    upper = (bits >> (64 - _UNIFORM_BITS)) & ((1 << _UNIFORM_BITS) - 1)
    uniform = (upper.to(torch.float64) + 0.5) * 2.0**-_UNIFORM_BITS
    return -torch.log(-torch.log(uniform))
