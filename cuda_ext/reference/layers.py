"""What a decoder layer does beside its linear layers and attention: norms, the activation, rotation.

Shape legend: N rows (tokens), D features, F half of a gate-up row, H query heads, G key-value heads, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.reference.cache import write_kv_


def rms_norm(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, in float32, as Hugging Face's LlamaRMSNorm."""
    x32_ND = x_ND.float()
    normed_ND = x32_ND * torch.rsqrt(x32_ND.pow(2).mean(-1, keepdim=True) + eps)
    return (weight_D.float() * normed_ND.to(x_ND.dtype).float()).to(x_ND.dtype)


def add_rms_norm(x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add, then norm: returns (rms_norm(x + residual), x + residual)."""
    total_ND = x_ND + residual_ND
    return rms_norm(total_ND, weight_D, eps), total_ND


def silu_mul(gate_up_N2F: Tensor) -> Tensor:
    """silu(gate) * up in float32, rounded once; the gate is the first half of a row."""
    gate_NF, up_NF = gate_up_N2F.float().chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate_NF) * up_NF).to(gate_up_N2F.dtype)


def rope_write_(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, cos_ND: Tensor, sin_ND: Tensor, kv_2SGD: Tensor, slots_N: Tensor
) -> None:
    """Rotate queries and keys in place, then write keys and values into their slots.

    The rotation pairs feature i with i + D/2 (Hugging Face's half rotation), in float32, rounded once. Inputs may be
    views of one fused projection (features of a head contiguous). The cache may have another dtype.
    """
    rotate_(q_NHD, k_NGD, cos_ND, sin_ND)
    write_kv_(kv_2SGD, k_NGD, v_NGD, slots_N)


def rotate_(q_NHD: Tensor, k_NGD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> None:
    """The rotary embedding of `rope_write_`, in place."""
    cos_N1D, sin_N1D = cos_ND.float()[:, None], sin_ND.float()[:, None]
    for heads in (q_NHD, k_NGD):
        heads32 = heads.float()
        first, second = heads32.chunk(2, dim=-1)
        heads.copy_(heads32 * cos_N1D + torch.cat((-second, first), -1) * sin_N1D)
