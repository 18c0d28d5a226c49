"""Randomness: Gumbel and uniform noise from a counter-based hash, keyed by (seed, position) or by (seed, text, stream).

Shared noise is keyed by (seed, position): both sides are meant to get the same. Rejection sampling needs noise that is
independent where the theory says so, in three streams: the draft's proposal, the acceptance, and the choice made of the
residual distribution or as bonus. Its keys name the *text so far*, which fixes the position too:

- A proposal is a function of (seed, text, q). However often a text is drafted, in a later round, in a second branch, or
  again after a miss, its proposal stays the same one, so nothing can pick the proposal that suits it.
- Proposals after different texts are independent. With keys of (seed, position) they would not be: the trunk's token at
  position i and the token that a branch has there would be drawn with one noise. Which branches exist depends on the
  trunk's tokens (a fan-out policy that expects a rejection at an unlikely token spends its budget there). So among the
  branches that hit, the noise would no longer be the noise of the definition, and their tokens no draw from q; a miss
  followed by a plain draw of the target does not make up for it. With keys of the text it does not matter which
  branches exist, or how long they are, as long as whether a token is offered for verification depends on anything but
  that token itself: the texts before it, other branches, clocks, other requests. So a branch may be used in part.
- Acceptance and choice are consulted once after each text, when the token there becomes final, and never earlier.

Two requests of one seed share noise only as far as their texts are the same from the first token.

Knows no logits and no ranks. Integer arithmetic only up to the last step, so that every device gets the same bits:
the same (seed, position, token) gives the same noise at the target, at the draft, in AR, SD and SSD, in any batch.
Source: the Gumbel-max coupling of Daliri, Musco, Suresh, "Coupling without communication and drafter-invariant
speculative decoding"; the hash is splitmix64 (Steele, Lea, Flood, OOPSLA 2014).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from enum import IntEnum

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


class Stream(IntEnum):
    """What noise keyed by a text is for. Values are far from any token id, so no longer text has the same key."""

    PROPOSAL = 0x7072_6F70_6F73_616C
    ACCEPTANCE = 0x6163_6365_7074_616E
    CHOICE = 0x6368_6F69_6365_0000


EMPTY_TEXT = 0x7465_7874  # the hash of no token at all


def extend_text(text: int, tokens: Iterable[int]) -> int:
    """The 64-bit hash of a text followed by `tokens`, from the hash of the text."""
    for token in tokens:
        text = splitmix64(text ^ token)
    return text


def text_key(seed: int, text: int, stream: Stream) -> int:
    """The 64-bit key of what is drawn after a text (its hash), as a signed integer that fits an int64 tensor."""
    return signed(splitmix64(splitmix64(splitmix64(seed & _MASK) ^ text) ^ stream))


def uniform_noise(key: int) -> float:
    """A uniform number in [0, 1) with 53 bits."""
    return (splitmix64(key & _MASK) >> 11) * 2.0**-53


def hash_tokens(key: int | Tensor, tokens: Tensor) -> Tensor:
    """64 bits for each token (or other number) under a key: splitmix64 of the key and a stride for each.

    Args:
        key: one key, or an int64 tensor that broadcasts against `tokens`.
        tokens: int64 tensor of any shape.
    """
    # int64 products wrap modulo 2^64 on every device; shifts are arithmetic, hence the masks.
    bits = tokens * signed(_GOLDEN) + key + signed(_GOLDEN)
    bits = (bits ^ ((bits >> 30) & ((1 << 34) - 1))) * signed(_MIX_1)
    bits = (bits ^ ((bits >> 27) & ((1 << 37) - 1))) * signed(_MIX_2)
    return bits ^ ((bits >> 31) & ((1 << 33) - 1))


def gumbel_noise(key: int | Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise g(s, i, v) of tokens under `noise_key(s, i)`.

    Args:
        key: one key, or an int64 tensor that broadcasts against `tokens`.
        tokens: int64 tensor of token ids, any shape.

    Returns:
        float64 tensor of the broadcast shape, between MIN_NOISE and MAX_NOISE.
    """
    bits = hash_tokens(key, tokens)
    upper = (bits >> (64 - _UNIFORM_BITS)) & ((1 << _UNIFORM_BITS) - 1)
    uniform = (upper.to(torch.float64) + 0.5) * 2.0**-_UNIFORM_BITS
    return -torch.log(-torch.log(uniform))
