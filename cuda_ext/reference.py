"""Every operator in plain torch: the oracle of the compiled kernels, and what runs where they are not built.

Knows no models and no caches. Shape legend: N rows (tokens), D features, I/O in/out features of a linear layer, F half
of a gate-up row, H query heads, G key-value heads, S slots, C columns of a table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

INT8_MAX = 127
GROUP = 32  # features that share a scale in a grouped layer
TINY = 1e-30  # a row no larger than this quantizes to zeros


@dataclass(frozen=True)
class PackedInt8:
    """An int8 linear layer as one backend wants it; never mixed between backends.

    Attributes:
        data: the weights, in the backend's layout.
        scales_O: float32, one per output channel: weight = scale * integer.
        in_features, out_features: the shape before packing.
    """

    data: Tensor
    scales_O: Tensor
    in_features: int
    out_features: int


@dataclass(frozen=True)
class PackedGrouped:
    """A linear layer of codes in groups of GROUP input features; never mixed between backends.

    Attributes:
        data: the codes (uint8), in the backend's layout; with the rest where the backend wants it so.
        scales_OG, minima_OG: float16, one a group: weight = scale * code + minimum.
        bits: of a code, 4 or 8.
        in_features, out_features: the shape before packing.
    """

    data: Tensor
    scales_OG: Tensor
    minima_OG: Tensor
    bits: int
    in_features: int
    out_features: int


@dataclass(frozen=True)
class PackedBf16:
    """A bfloat16 linear layer as one backend wants it; never mixed between backends."""

    data: Tensor
    in_features: int
    out_features: int


@dataclass(frozen=True)
class PackedFp32:
    """A float32 linear layer as one backend wants it; never mixed between backends."""

    data: Tensor
    in_features: int
    out_features: int


@dataclass(frozen=True)
class DecoderWeights:
    """All layers of a decoder as `decoder_layers_` of the compiled backend wants them.

    Attributes:
        kind: what the linear layers were packed as: "int4", "int8", "bf16" or "fp32".
        num_heads, intermediate_size, eps: what the tensors do not say.
        norms_ME: the norms before attention and before the MLP of each layer in turn, then the last one (M = 2L + 1).
        head_norms_MD: of queries and of keys, layer by layer (M = 2L); None for models without.
        qkv, attention_out, gate_up, down: packed weights, one a layer.
        qkv_bias_LO: None for models without.
    """

    kind: str
    num_heads: int
    intermediate_size: int
    eps: float
    norms_ME: Tensor
    head_norms_MD: Tensor | None
    qkv: tuple[Tensor, ...]
    qkv_bias_LO: Tensor | None
    attention_out: tuple[Tensor, ...]
    gate_up: tuple[Tensor, ...]
    down: tuple[Tensor, ...]


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


def quantize_rows(x_NI: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 by row: absmax becomes 127, halves round to even. Returns integers NI and float32 scales N."""
    x32_NI = x_NI.float()
    absmax_N = x32_NI.abs().amax(-1) if x32_NI.shape[-1] else x32_NI.new_zeros(x32_NI.shape[0])
    inverse_N = torch.where(absmax_N > TINY, torch.full_like(absmax_N, INT8_MAX) / absmax_N, 0.0)
    return torch.round(x32_NI * inverse_N[:, None]).to(torch.int8), absmax_N / INT8_MAX


def pack_int8(weight_OI: Tensor) -> PackedInt8:
    """Quantize a weight matrix per output channel (absmax / 127, symmetric)."""
    integers_OI, scales_O = quantize_rows(weight_OI)
    return PackedInt8(integers_OI.contiguous(), scales_O, weight_OI.shape[1], weight_OI.shape[0])


def linear_int8(x_NI: Tensor, packed: PackedInt8, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias with rows of x quantized as they come: exact integers, then one scale a row and one a channel."""
    integers_NI, scales_N = quantize_rows(x_NI)
    if x_NI.shape[0] == 0:
        return x_NI.new_empty(0, packed.out_features)
    if min(packed.in_features, packed.out_features) > 1:
        sums_NO = torch._int_mm(integers_NI, packed.data.t())
    else:  # _int_mm of torch 2.13 misreads the strides of such a matrix
        sums_NO = (integers_NI.double() @ packed.data.double().t()).to(torch.int32)
    out_NO = sums_NO.float() * scales_N[:, None] * packed.scales_O
    if bias_O is not None:
        out_NO += bias_O
    return out_NO.to(x_NI.dtype)


def pack_grouped(weight_OI: Tensor, bits: int) -> PackedGrouped:
    """Quantize a weight matrix to 4 or 8 bits by groups of GROUP input features: the least of a group becomes code 0,
    the largest the last code. A matrix that was quantized so before (Q4_1 of GGUF, 4 bits) comes out as it was."""
    levels, missing = 2**bits - 1, -weight_OI.shape[1] % GROUP
    weight_OI = weight_OI.float()
    # The last feature fills the last group: it widens no range.
    padded_OI = torch.cat((weight_OI, weight_OI[:, -1:].expand(-1, missing)), dim=1) if missing else weight_OI
    groups_OGC = padded_OI.unflatten(1, (-1, GROUP))
    least_OG, most_OG = groups_OGC.amin(-1), groups_OGC.amax(-1)
    scales_OG, minima_OG = ((most_OG - least_OG) / levels).half(), least_OG.half()
    codes_OGC = (groups_OGC - minima_OG.float()[..., None]) / scales_OG.float().clamp_min(TINY)[..., None]
    codes_OGC = codes_OGC.round_().clamp_(0, levels).to(torch.uint8)
    codes_OI = codes_OGC.flatten(1)[:, : weight_OI.shape[1]].contiguous()
    return PackedGrouped(codes_OI, scales_OG, minima_OG, bits, weight_OI.shape[1], weight_OI.shape[0])


def linear_grouped(x_NI: Tensor, packed: PackedGrouped, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias with each group of a row quantized to int8 as it comes: exact integers inside a group."""
    num_rows, num_groups, missing = x_NI.shape[0], packed.scales_OG.shape[1], -packed.in_features % GROUP
    x_XC = torch.nn.functional.pad(x_NI, (0, missing)).reshape(num_rows * num_groups, GROUP)
    integers_XC, scales_X = quantize_rows(x_XC)
    integers_GNC = integers_XC.float().view(num_rows, num_groups, GROUP).transpose(0, 1)
    scales_GN = scales_X.view(num_rows, num_groups).t()
    codes_GCO = torch.nn.functional.pad(packed.data, (0, missing)).view(-1, num_groups, GROUP).permute(1, 2, 0)
    dots_GNO = torch.bmm(integers_GNC, codes_GCO.float())  # below 2^24: exact in float32
    weight_scales_GO, minima_GO = packed.scales_OG.float().t(), packed.minima_OG.float().t()
    out_NO = (dots_GNO * (scales_GN[:, :, None] * weight_scales_GO[:, None])).sum(0)
    out_NO += (scales_GN * integers_GNC.sum(-1)).t() @ minima_GO
    if bias_O is not None:
        out_NO += bias_O
    return out_NO.to(x_NI.dtype)


def pack_bf16(weight_OI: Tensor) -> PackedBf16:
    """Round a weight matrix to bfloat16 and lay it out for oneDNN (as it is on other devices than the CPU)."""
    weight_OI = weight_OI.to(torch.bfloat16).contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI) if _onednn(weight_OI) else weight_OI
    return PackedBf16(packed, weight_OI.shape[1], weight_OI.shape[0])


def linear_bf16(x_NI: Tensor, packed: PackedBf16, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias in bfloat16, accumulated in float32; the result has x's dtype."""
    if x_NI.shape[0] == 0:
        return x_NI.new_empty(0, packed.out_features)
    x16_NI = x_NI.to(torch.bfloat16)
    bias_O = None if bias_O is None else bias_O.to(torch.bfloat16)
    if packed.data.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x16_NI, packed.data, bias_O, "none", [], "").to(x_NI.dtype)
    return torch.nn.functional.linear(x16_NI, packed.data, bias_O).to(x_NI.dtype)


def pack_fp32(weight_OI: Tensor) -> PackedFp32:
    """Keep a weight matrix in float32."""
    return PackedFp32(weight_OI.float().contiguous(), weight_OI.shape[1], weight_OI.shape[0])


def linear_fp32(x_NI: Tensor, packed: PackedFp32, bias_O: Tensor | None) -> Tensor:
    """x W^T + bias in float32; the result has x's dtype."""
    bias_O = None if bias_O is None else bias_O.float()
    return torch.nn.functional.linear(x_NI.float(), packed.data, bias_O).to(x_NI.dtype)


def sample_shared_noise(
    logits_RV: Tensor,
    temperature_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    min_p_R: Tensor,
    seed_R: Tensor,
    position_R: Tensor,
    count: int = 1,
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

    Returns: tokens (int64) and their noised scores (float64), both [R, count]; -1 and -inf where processors leave
    fewer. Column 0 is the token chosen.
    """
    chosen_RF = torch.full((logits_RV.shape[0], count), -1, dtype=torch.int64, device=logits_RV.device)
    scores_RF = torch.full_like(chosen_RF, -torch.inf, dtype=torch.float64)
    tokens_V = torch.arange(logits_RV.shape[1], device=logits_RV.device)
    key_R = _splitmix64(_splitmix64(seed_R) ^ position_R)
    for row, logits_V in enumerate(logits_RV):
        score_V = logits_V.double()
        if temperature_R[row] > 0:
            z_V = logits_V.float() / float(temperature_R[row])
            floor = _processors_floor(z_V, int(top_k_R[row]), float(top_p_R[row]), float(min_p_R[row]))
            score_V = z_V.masked_fill(z_V < floor, -torch.inf).double() + _gumbel_noise(key_R[row], tokens_V)
        order = torch.sort(score_V, descending=True, stable=True).indices[:count]
        order = order[score_V[order] > -torch.inf]
        chosen_RF[row, : order.numel()] = order
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


def lookup_branches(
    keys_TC: Tensor, tokens_TK: Tensor, lengths_T: Tensor, outcomes_BC: Tensor
) -> tuple[Tensor, Tensor]:
    """The speculation cache as a table: the branch of each outcome, the longest of several, of equals the last.

    Args:
        keys_TC: int64, for example (sequence, turn, num_accepted, bonus_token); first column -1: the row is empty.
        tokens_TK: int64, the branches, padded.
        lengths_T: int64; how many tokens of a branch count.
        outcomes_BC: int64, what to look up.

    Returns: tokens BK, padded with -1, and lengths B, -1 at a miss.
    """
    num_entries = keys_TC.shape[0]
    entries_T = torch.arange(num_entries, device=keys_TC.device)
    match_BT = (outcomes_BC[:, None] == keys_TC).all(-1) & (keys_TC[:, 0] >= 0)
    ranks_BT = torch.where(match_BT, lengths_T * num_entries + entries_T, -1)
    if num_entries == 0:
        return tokens_TK.new_full((outcomes_BC.shape[0], tokens_TK.shape[1]), -1), ranks_BT.new_full(
            (outcomes_BC.shape[0],), -1
        )
    best_B, entry_B = ranks_BT.max(1)
    found_lengths_B = torch.where(best_B >= 0, lengths_T[entry_B], -1)
    columns_K = torch.arange(tokens_TK.shape[1], device=keys_TC.device)
    return torch.where(columns_K < found_lengths_B[:, None], tokens_TK[entry_B], -1), found_lengths_B


def raise_faults(like: Tensor) -> None:
    """Raise RuntimeError where a device kernel has met a wrong value since the last call; nothing to do elsewhere."""


def _onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
