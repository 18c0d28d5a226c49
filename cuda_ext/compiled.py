"""The operators of the compiled extension, with the signatures of `cuda_ext.reference`. Importing it loads the library.

A row's result depends on that row alone: not on how many rows share the call, nor on the number of threads.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ext import fakes, fallbacks, reference
from cuda_ext.reference import DecoderWeights, PackedBf16, PackedFp32, PackedGrouped, PackedInt8, Span


def _load() -> None:
    """Load the shared library.

    Raises:
        ImportError: it was not built.
        OSError: it does not fit this torch.
        ValueError: SSD_CPU_LEVEL asks for kernels that do not run here.
    """
    spec = importlib.util.find_spec("cuda_ext._C")
    if spec is None or spec.origin is None:
        raise ImportError("cuda_ext._C is not built (make ext)")
    torch.ops.load_library(spec.origin)
    try:
        torch.ops.ssd_runtime.cpu_level()
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None


_load()
fakes.register()
HAS_CUDA_KERNELS = fallbacks.has_kernel("copy_branch_")
_fallbacks = fallbacks.register()
_ops = torch.ops.ssd_runtime
_pack_linear = _ops.pack_linear.default
_linear_int8 = _ops.linear_int8.default
_pack_grouped = _ops.pack_grouped.default
_linear_grouped = _ops.linear_grouped.default
_linear_bf16 = _ops.linear_bf16.default
_linear_fp32 = _ops.linear_fp32.default
rms_norm = _ops.rms_norm.default
add_rms_norm = _ops.add_rms_norm.default
silu_mul = _ops.silu_mul.default
rope_write_ = _ops.rope_write_.default
_paged_attention = _ops.paged_attention.default
_decoder_layers_ = _ops.decoder_layers_.default
copy_branch_ = _ops.copy_branch_.default
write_kv_ = _ops.write_kv_.default
rollback_ = _ops.rollback_.default
match_outcomes = _ops.match_outcomes.default
raise_faults = _ops.raise_faults.default
sample_shared_noise = _ops.sample_shared_noise.default


def cpu_level() -> str:
    """Which CPU kernels run here: "baseline", "avx2" or "avx512"."""
    return _ops.cpu_level()


def new_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return reference.new_cache(shape, dtype, device)
    return _ops.huge_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape).zero_()


def pack_int8(weight_OI: Tensor) -> PackedInt8:
    if weight_OI.device.type != "cpu":
        return reference.pack_int8(weight_OI)
    plain = reference.pack_int8(weight_OI)
    return PackedInt8(_pack_linear(plain.data, plain.scales_O), plain.scales_O, plain.in_features, plain.out_features)


def pack_grouped(weight_OI: Tensor, bits: int) -> PackedGrouped:
    plain = reference.pack_grouped(weight_OI, bits)
    if weight_OI.device.type != "cpu":
        return plain
    data, none = _pack_grouped(plain.data, plain.scales_OG, plain.minima_OG, bits), plain.scales_OG.new_empty(0)
    return dataclasses.replace(plain, data=data, scales_OG=none, minima_OG=none)


def pack_bf16(weight_OI: Tensor) -> PackedBf16:
    if weight_OI.device.type != "cpu":
        return reference.pack_bf16(weight_OI)
    return PackedBf16(
        _pack_linear(weight_OI.to(torch.bfloat16).contiguous(), None), weight_OI.shape[1], weight_OI.shape[0]
    )


def pack_fp32(weight_OI: Tensor) -> PackedFp32:
    if weight_OI.device.type != "cpu":
        return reference.pack_fp32(weight_OI)
    return PackedFp32(_pack_linear(weight_OI.float().contiguous(), None), weight_OI.shape[1], weight_OI.shape[0])


def linear_int8(x_NI: Tensor, packed: PackedInt8, bias_O: Tensor | None) -> Tensor:
    if x_NI.device.type != "cpu":
        return reference.linear_int8(x_NI, packed, bias_O)
    return _linear_int8(x_NI, packed.data, packed.out_features, bias_O)


def linear_grouped(x_NI: Tensor, packed: PackedGrouped, bias_O: Tensor | None) -> Tensor:
    if x_NI.device.type != "cpu":
        return reference.linear_grouped(x_NI, packed, bias_O)
    return _linear_grouped(x_NI, packed.data, packed.out_features, bias_O, packed.bits)


def linear_bf16(x_NI: Tensor, packed: PackedBf16, bias_O: Tensor | None) -> Tensor:
    if x_NI.device.type != "cpu":
        return reference.linear_bf16(x_NI, packed, bias_O)
    return _linear_bf16(x_NI, packed.data, packed.out_features, bias_O)


def linear_fp32(x_NI: Tensor, packed: PackedFp32, bias_O: Tensor | None) -> Tensor:
    if x_NI.device.type != "cpu":
        return reference.linear_fp32(x_NI, packed, bias_O)
    return _linear_fp32(x_NI, packed.data, packed.out_features, bias_O)


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
    """On the CPU the rows may come in any order, and the spans are not looked at."""
    if q_NHD.device.type != "cpu":
        return reference.paged_attention(q_NHD, kv_2SGD, sequence_N, tables_SC, prefix_N, chain_NC, scale, spans)
    return _paged_attention(q_NHD, kv_2SGD, sequence_N, tables_SC, prefix_N, chain_NC, scale)


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
    return _decoder_layers_(
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
        weights.kind,
        weights.num_heads,
        weights.intermediate_size,
        weights.eps,
        weights.norms_ME,
        weights.head_norms_MD,
        weights.qkv,
        weights.qkv_bias_LO,
        weights.attention_out,
        weights.attention_out_bias_LE,
        weights.gate_up,
        weights.gate_up_bias_LI,
        weights.down,
        weights.down_bias_LE,
    )
