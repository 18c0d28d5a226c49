"""Linear layers: quantizing and packing their weights, and x W^T + bias.

Shape legend: N rows (tokens), I/O in/out features, G groups of input features, C features of a group, X groups of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext.reference.weights import PackedFloat, PackedGrouped, PackedInt8

INT8_MAX = 127
GROUP = 32  # features that share a scale in a grouped layer
TINY = 1e-30  # a row no larger than this quantizes to zeros


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


def linear_int8(x_NI: Tensor, packed: PackedInt8, bias_O: Tensor | None = None) -> Tensor:
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


def linear_grouped(x_NI: Tensor, packed: PackedGrouped, bias_O: Tensor | None = None) -> Tensor:
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


def pack_bf16(weight_OI: Tensor) -> PackedFloat:
    """Round a weight matrix to bfloat16 and lay it out for oneDNN (as it is on other devices than the CPU)."""
    weight_OI = weight_OI.to(torch.bfloat16).contiguous()
    packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI) if _onednn(weight_OI) else weight_OI
    return PackedFloat(packed, weight_OI.shape[1], weight_OI.shape[0])


def linear_bf16(x_NI: Tensor, packed: PackedFloat, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias in bfloat16, accumulated in float32; the result has x's dtype."""
    if x_NI.shape[0] == 0:
        return x_NI.new_empty(0, packed.out_features)
    x16_NI = x_NI.to(torch.bfloat16)
    bias_O = None if bias_O is None else bias_O.to(torch.bfloat16)
    if packed.data.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x16_NI, packed.data, bias_O, "none", [], "").to(x_NI.dtype)
    return torch.nn.functional.linear(x16_NI, packed.data, bias_O).to(x_NI.dtype)


def pack_fp32(weight_OI: Tensor) -> PackedFloat:
    """Keep a weight matrix in float32."""
    return PackedFloat(weight_OI.float().contiguous(), weight_OI.shape[1], weight_OI.shape[0])


def linear_fp32(x_NI: Tensor, packed: PackedFloat, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + bias in float32; the result has x's dtype."""
    bias_O = None if bias_O is None else bias_O.float()
    return torch.nn.functional.linear(x_NI.float(), packed.data, bias_O).to(x_NI.dtype)


def _onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
