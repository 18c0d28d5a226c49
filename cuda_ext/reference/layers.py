"""What a decoder layer does beside its linear layers: norms, the activation, rotation, attention.

Shape legend: N rows (tokens), D features, F half of a gate-up row, H query heads, G key-value heads, S slots, T slots
that a row may see, C columns of a table.
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


def paged_attention(
    q_NHD: Tensor,
    kv_2SGD: Tensor,
    sequence_N: Tensor,
    tables_SC: Tensor,
    prefix_N: Tensor,
    chain_ND: Tensor,
    scale: float,
) -> Tensor:
    """Attention of each row over its sequence's prefix and its own chain of slots, in float32.

    Args:
        q_NHD: queries; head h reads key-value head h // (H // G).
        kv_2SGD: one layer's keys and values by slot.
        sequence_N: which row of the tables a query belongs to.
        tables_SC: slots of each sequence in order.
        prefix_N: how many of them a query sees.
        chain_ND: further slots, one list a query, -1 for none.
        scale: factor on the scores.

    Returns: NHD in the queries' dtype; a row that sees nothing is zero.
    """
    num_rows, num_heads, head_dim = q_NHD.shape
    num_groups = kv_2SGD.shape[2]
    if num_rows == 0:
        return torch.empty_like(q_NHD)
    width = int(prefix_N.max())
    slots_NT = torch.cat((tables_SC[sequence_N, :width], chain_ND), dim=1)
    visible_NT = torch.cat((torch.arange(width, device=q_NHD.device) < prefix_N[:, None], chain_ND >= 0), dim=1)
    slots_NT = slots_NT.where(visible_NT, 0)
    keys_NTGD, values_NTGD = kv_2SGD[0, slots_NT].float(), kv_2SGD[1, slots_NT].float()
    hidden_NT11 = ~visible_NT[:, :, None, None]
    values_NTGD = values_NTGD.masked_fill(hidden_NT11, 0.0)  # a hidden slot may hold anything, even NaN
    q_NGRD = q_NHD.float().reshape(num_rows, num_groups, num_heads // num_groups, head_dim) * scale
    scores_NGRT = torch.einsum("ngrd,ntgd->ngrt", q_NGRD, keys_NTGD)
    scores_NGRT = scores_NGRT.masked_fill(~visible_NT[:, None, None, :], float("-inf"))
    weights_NGRT = torch.softmax(scores_NGRT, -1).masked_fill(~visible_NT.any(1)[:, None, None, None], 0.0)
    return torch.einsum("ngrt,ntgd->ngrd", weights_NGRT, values_NTGD).reshape(q_NHD.shape).to(q_NHD.dtype)
