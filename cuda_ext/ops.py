"""The operators the runtime calls: the compiled extension where it is built, else plain torch.

Picked once, at first use. Signatures and meanings are those of `cuda_ext.reference`. `SSD_CUDA_EXT=0` in the
environment asks for plain torch.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from cuda_ext import reference
from cuda_ext.reference import DecoderWeights, PackedBf16, PackedFp32, PackedGrouped, PackedInt8, Span

log = logging.getLogger(__name__)

__all__ = [
    "DecoderWeights",
    "PackedBf16",
    "PackedFp32",
    "PackedGrouped",
    "PackedInt8",
    "Span",
    "about",
    "add_rms_norm",
    "backend",
    "compiled_for",
    "copy_branch_",
    "decoder_layers_",
    "linear_bf16",
    "linear_fp32",
    "linear_grouped",
    "linear_int8",
    "match_outcomes",
    "new_cache",
    "pack_bf16",
    "pack_fp32",
    "pack_grouped",
    "pack_int8",
    "paged_attention",
    "raise_faults",
    "rms_norm",
    "rollback_",
    "rope_write_",
    "sample_shared_noise",
    "silu_mul",
    "write_kv_",
]


@functools.cache
def _kernels() -> ModuleType:
    if os.environ.get("SSD_CUDA_EXT") == "0":
        return reference
    try:
        return importlib.import_module("cuda_ext.compiled")
    except (ImportError, OSError) as error:  # not built, or built for a torch it cannot be loaded into
        log.warning("compiled operators not available (%s); using plain torch, which is slower", error)
        return reference


def backend() -> Literal["compiled", "plain"]:
    """Which implementation this process uses; raises ValueError for kernels asked for that do not run here."""
    return "plain" if _kernels() is reference else "compiled"


def compiled_for(device: torch.device) -> bool:
    """Whether compiled kernels serve the operators on the cache and on tokens on this kind of device."""
    if backend() == "plain":
        return False
    return device.type == "cpu" or (device.type == "cuda" and bool(_kernels().HAS_CUDA_KERNELS))


def about() -> str:
    """One line for people: which implementation, its level on this CPU, and whether it holds CUDA kernels."""
    if backend() == "compiled":
        cuda = "built in" if _kernels().HAS_CUDA_KERNELS else "not built in (plain torch serves CUDA tensors)"
        return f"compiled extension: CPU kernels {_kernels().cpu_level()}, CUDA kernels {cuda}"
    if os.environ.get("SSD_CUDA_EXT") == "0":
        return "plain torch, which is slower (SSD_CUDA_EXT=0 asks for it)"
    return "plain torch, which is slower (`make ext` builds the extension)"


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _kernels().rms_norm(x_ND, weight_D, eps)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _kernels().add_rms_norm(x_ND, residual_ND, weight_D, eps)


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    return _kernels().silu_mul(gate_up_N2F)


def rope_write_(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, cos_ND: Tensor, sin_ND: Tensor, kv_2SGD: Tensor, slots_N: Tensor
) -> None:
    _kernels().rope_write_(q_NHD, k_NGD, v_NGD, cos_ND, sin_ND, kv_2SGD, slots_N)


def paged_attention(
    q_NHD: Tensor,
    kv_2SGD: Tensor,
    sequence_N: Tensor,
    tables_SC: Tensor,
    prefix_N: Tensor,
    chain_NC: Tensor,
    scale: float,
    spans: Sequence[Span],
) -> Tensor:
    return _kernels().paged_attention(q_NHD, kv_2SGD, sequence_N, tables_SC, prefix_N, chain_NC, scale, spans)


def decoder_layers_(
    weights: DecoderWeights,
    embedding_VE: Tensor,
    tokens_N: Tensor,
    cos_ND: Tensor,
    sin_ND: Tensor,
    kv_L2SGD: Tensor,
    slots_N: Tensor,
    sequence_N: Tensor,
    tables_SC: Tensor,
    prefix_N: Tensor,
    chain_ND: Tensor,
    logit_rows_R: Tensor | None,
    scale: float,
) -> Tensor:
    """All layers of a forward in one call: the wanted rows after the last norm, RE. Compiled, on the CPU only.

    Its oracle is the walk over single operators in ssd_runtime.model.decoder, which gives the same bits.
    """
    result: Tensor = _kernels().decoder_layers_(
        weights,
        embedding_VE,
        tokens_N,
        cos_ND,
        sin_ND,
        kv_L2SGD,
        slots_N,
        sequence_N,
        tables_SC,
        prefix_N,
        chain_ND,
        logit_rows_R,
        scale,
    )
    return result


def pack_int8(weight_OI: Tensor) -> PackedInt8:
    return _kernels().pack_int8(weight_OI)


def linear_int8(x_NI: Tensor, packed: PackedInt8, bias_O: Tensor | None = None) -> Tensor:
    return _kernels().linear_int8(x_NI, packed, bias_O)


def pack_grouped(weight_OI: Tensor, bits: int) -> PackedGrouped:
    return _kernels().pack_grouped(weight_OI, bits)


def linear_grouped(x_NI: Tensor, packed: PackedGrouped, bias_O: Tensor | None = None) -> Tensor:
    return _kernels().linear_grouped(x_NI, packed, bias_O)


def pack_bf16(weight_OI: Tensor) -> PackedBf16:
    return _kernels().pack_bf16(weight_OI)


def linear_bf16(x_NI: Tensor, packed: PackedBf16, bias_O: Tensor | None = None) -> Tensor:
    return _kernels().linear_bf16(x_NI, packed, bias_O)


def pack_fp32(weight_OI: Tensor) -> PackedFp32:
    return _kernels().pack_fp32(weight_OI)


def linear_fp32(x_NI: Tensor, packed: PackedFp32, bias_O: Tensor | None = None) -> Tensor:
    return _kernels().linear_fp32(x_NI, packed, bias_O)


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
    return _kernels().sample_shared_noise(
        logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seed_R, position_R, count, first_token
    )


def new_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return _kernels().new_cache(shape, dtype, device)


def copy_branch_(kv: Tensor, source_slots_N: Tensor, target_slots_N: Tensor) -> None:
    _kernels().copy_branch_(kv, source_slots_N, target_slots_N)


def write_kv_(kv_2SGD: Tensor, key_NGD: Tensor, value_NGD: Tensor, slots_N: Tensor) -> None:
    _kernels().write_kv_(kv_2SGD, key_NGD, value_NGD, slots_N)


def match_outcomes(target_tokens_BL: Tensor, draft_tokens_BK: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels().match_outcomes(target_tokens_BL, draft_tokens_BK, lengths_B)


def rollback_(
    tables_SC: Tensor,
    lengths_S: Tensor,
    sequences_N: Tensor,
    kept_N: Tensor,
    block_size: int,
    poison_kv: Tensor | None = None,
) -> None:
    _kernels().rollback_(tables_SC, lengths_S, sequences_N, kept_N, block_size, poison_kv)


def raise_faults(like: Tensor) -> None:
    _kernels().raise_faults(like)
