"""The operators of the compiled extension, with the signatures of `cuda_ext.reference`. Importing it loads the library.

A row's result depends on that row alone: not on how many rows share the call, nor on the number of threads.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cuda_ext import fallbacks, reference
from cuda_ext.reference.weights import DecoderWeights, PackedFloat, PackedGrouped, PackedInt8


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
_ops = torch.ops.ssd_runtime
HAS_CUDA_KERNELS = fallbacks.has_kernel("copy_branch_")
_fallbacks = fallbacks.register()

# Of these torch picks the kernel by the tensors' device: a compiled one, or a fallback.
rms_norm = _ops.rms_norm.default
add_rms_norm = _ops.add_rms_norm.default
silu_mul = _ops.silu_mul.default
rope_write_ = _ops.rope_write_.default
copy_branch_ = _ops.copy_branch_.default
write_kv_ = _ops.write_kv_.default
rollback_ = _ops.rollback_.default
match_outcomes = _ops.match_outcomes.default
sample_shared_noise = _ops.sample_shared_noise.default
raise_faults = _ops.raise_faults.default

# Of the others Python does, since the schemas differ from the signatures: they are on the CPU only, else plain torch.
_pack_linear = _ops.pack_linear.default
_linear_grouped = _ops.linear_grouped.default
_paged_attention = _ops.paged_attention.default


def _linear(kind: str) -> Callable[..., Tensor]:
    own, plain = getattr(_ops, f"linear_{kind}").default, getattr(reference, f"linear_{kind}")

    def linear(x_NI: Tensor, packed: Any, bias_O: Tensor | None = None) -> Tensor:
        if x_NI.device.type != "cpu":
            return plain(x_NI, packed, bias_O)
        return own(x_NI, packed.data, packed.out_features, bias_O)

    return linear


linear_int8, linear_bf16, linear_fp32 = _linear("int8"), _linear("bf16"), _linear("fp32")


def linear_grouped(x_NI: Tensor, packed: PackedGrouped, bias_O: Tensor | None = None) -> Tensor:
    if x_NI.device.type != "cpu":
        return reference.linear_grouped(x_NI, packed, bias_O)
    return _linear_grouped(x_NI, packed.data, packed.out_features, bias_O, packed.bits)


def pack_int8(weight_OI: Tensor) -> PackedInt8:
    plain = reference.pack_int8(weight_OI)
    if weight_OI.device.type != "cpu":
        return plain
    return dataclasses.replace(plain, data=_pack_linear(plain.data, plain.scales_O))


def pack_grouped(weight_OI: Tensor, bits: int) -> PackedGrouped:
    plain = reference.pack_grouped(weight_OI, bits)
    if weight_OI.device.type != "cpu":
        return plain
    data, none = _ops.pack_grouped(plain.data, plain.scales_OG, plain.minima_OG, bits), plain.scales_OG.new_empty(0)
    return dataclasses.replace(plain, data=data, scales_OG=none, minima_OG=none)


def pack_bf16(weight_OI: Tensor) -> PackedFloat:
    if weight_OI.device.type != "cpu":
        return reference.pack_bf16(weight_OI)
    return PackedFloat(_pack_linear(weight_OI.bfloat16().contiguous(), None), weight_OI.shape[1], weight_OI.shape[0])


def pack_fp32(weight_OI: Tensor) -> PackedFloat:
    plain = reference.pack_fp32(weight_OI)
    return plain if weight_OI.device.type != "cpu" else dataclasses.replace(plain, data=_pack_linear(plain.data, None))


def new_cache(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return reference.new_cache(shape, dtype, device)
    return _ops.huge_memory(math.prod(shape) * dtype.itemsize).view(dtype).view(*shape).zero_()


def cpu_level() -> str:
    """Which CPU kernels run here: "baseline", "avx2" or "avx512"."""
    return _ops.cpu_level()


def paged_attention(q_NHD: Tensor, *others: Any) -> Tensor:
    """On the CPU the rows may come in any order, and the spans, the last of the others, are not looked at."""
    if q_NHD.device.type != "cpu":
        return reference.paged_attention(q_NHD, *others)
    return _paged_attention(q_NHD, *others[:-1])


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
    """All layers of a forward in one call: the wanted rows after the last norm, RE. On the CPU only.

    Its oracle is the walk over single operators in ssd_runtime.model.decoder, which gives the same bits.
    """
    rows = (tokens_N, cos_ND, sin_ND, kv_L2SGD, slots_N, sequence_N, tables_SC, prefix_N, chain_ND, logit_rows_R)
    return _ops.decoder_layers_.default(embedding_VE, *rows, scale, *vars(weights).values())  # in their order
