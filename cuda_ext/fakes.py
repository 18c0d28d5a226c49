"""Fake implementations of the cache and token operators: shapes and dtypes alone, for tracing and compilation."""

from __future__ import annotations

import torch
from torch import Tensor


def register() -> None:
    """Tell torch about them; once, after the library is loaded."""
    for name in ("copy_branch_", "write_kv_", "rollback_", "raise_faults"):
        torch.library.register_fake(f"ssd_runtime::{name}", _nothing)
    torch.library.register_fake("ssd_runtime::match_outcomes", _match_outcomes)
    torch.library.register_fake("ssd_runtime::sample_shared_noise", _sample_shared_noise)


def _nothing(*_: object) -> None:
    """An operator that changes its arguments and returns nothing."""


def _match_outcomes(target_tokens_BL: Tensor, draft_tokens_BK: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    return target_tokens_BL.new_empty(lengths_B.shape), target_tokens_BL.new_empty(lengths_B.shape)


def _sample_shared_noise(
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
    num_rows = logits_RV.shape[0]
    return seed_R.new_empty(num_rows, count), temperature_R.new_empty(num_rows, count)
