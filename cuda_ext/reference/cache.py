"""Moves of rows in a KV cache, and the tables of tokens around a verification.

Shape legend: N rows, S slots or sequences, G key-value heads, D features, B sequences of a batch, K draft tokens
(L = K + 1), C columns of a table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def new_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros for a KV pool. The compiled one takes huge pages on a CPU: rows are scattered, most would miss the TLB."""
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def copy_branch_(kv: Tensor, source_slots_N: Tensor, target_slots_N: Tensor) -> None:
    """Move rows between slots, keys and values of all layers; safe when sources and targets overlap.

    Args:
        kv: [layer, 2, slot, head, dim], changed in place.
        source_slots_N, target_slots_N: int64; targets distinct.
    """
    kv.index_copy_(2, target_slots_N, kv.index_select(2, source_slots_N))


def write_kv_(kv_2SGD: Tensor, key_NGD: Tensor, value_NGD: Tensor, slots_N: Tensor) -> None:
    """Scatter fresh keys and values (strided inputs allowed, another dtype too) to their slots."""
    kv_2SGD[0, slots_N] = key_NGD.to(kv_2SGD.dtype)
    kv_2SGD[1, slots_N] = value_NGD.to(kv_2SGD.dtype)


def rollback_(
    tables_SC: Tensor,
    lengths_S: Tensor,
    sequences_N: Tensor,
    kept_N: Tensor,
    block_size: int,
    poison_kv: Tensor | None = None,
) -> None:
    """Shorten sequences: new lengths, and no slot in a table behind the last block that is still needed.

    Args:
        tables_SC: int64, slots of each sequence by position; given back entries become -1. Changed in place.
        lengths_S: int64, rows of each sequence that hold a token. Changed in place.
        sequences_N: int64, distinct; -1 pads a batch of fixed shape.
        kept_N: int64, at most the length of the sequence.
        block_size: slots in one block.
        poison_kv: [layer, 2, slot, head, dim]; the dropped rows become NaN, so that whoever still reads one shows.
    """
    for sequence, kept in zip(sequences_N.tolist(), kept_N.tolist(), strict=True):
        if sequence < 0:
            continue
        if poison_kv is not None:
            poison_kv[:, :, tables_SC[sequence, kept : int(lengths_S[sequence])]] = torch.nan
        lengths_S[sequence] = kept
        tables_SC[sequence, -(-kept // block_size) * block_size :] = -1


def match_outcomes(target_tokens_BL: Tensor, draft_tokens_BK: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    """Verify a batch of speculations: accept while the draft's token equals the target's own.

    Args:
        target_tokens_BL: int64; the target's own token after the bonus token and after each draft token, L = K + 1.
        draft_tokens_BK: int64, padded.
        lengths_B: int64; how many draft tokens of a row count.

    Returns: num_accepted_B and bonus_token_B, int64.
    """
    columns_K = torch.arange(draft_tokens_BK.shape[1], device=draft_tokens_BK.device)
    equal_BK = (target_tokens_BL[:, :-1] == draft_tokens_BK) & (columns_K < lengths_B[:, None])
    num_accepted_B = equal_BK.to(torch.int64).cumprod(1).sum(1)
    return num_accepted_B, target_tokens_BL.gather(1, num_accepted_B[:, None]).squeeze(1)


def raise_faults(like: Tensor) -> None:
    """Raise RuntimeError where a device kernel has met a wrong value since the last call; nothing to do elsewhere."""
