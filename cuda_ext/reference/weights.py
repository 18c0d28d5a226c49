"""What packed weights are: linear layers as one backend wants them, and all layers of a decoder together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


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
    """A linear layer of codes in groups of 32 input features (GROUP in linear.py); never mixed between backends.

    Attributes:
        data: the codes (uint8), in the backend's layout; with the rest where the backend wants it so.
        scales_OG, minima_OG: float16, one a group: weight = scale * code + minimum. Empty where `data` has them.
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
class PackedFloat:
    """A bfloat16 or float32 linear layer as one backend wants it; never mixed between backends."""

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
        qkv_bias_LO, attention_out_bias_LE, gate_up_bias_LI, down_bias_LE: None for models without.
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
    attention_out_bias_LE: Tensor | None
    gate_up: tuple[Tensor, ...]
    gate_up_bias_LI: Tensor | None
    down: tuple[Tensor, ...]
    down_bias_LE: Tensor | None
