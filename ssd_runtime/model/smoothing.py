"""Makes int8 activations easier to round, at no cost when running. Knows no files and no packed weights.

A few features of a language model are far larger than the rest, and rounding a row to int8 by its largest value
leaves little for the others. As every such feature is multiplied by a column of the next matrix, its size can be moved
there once and for all: out of a norm's weight, the rows of `up` or of `v`. Each feature is divided by
sqrt(largest activation / largest weight), measured on a short text (SmoothQuant, arXiv 2211.10438, alpha = 1/2). On
SmolLM2, over 384 tokens, int8 then overlaps bf16's distribution by .94 instead of .92 and greedily chooses its token at
.92 to .95 of the positions, depending on the text, instead of .90; on Qwen2.5 0.5B both are .97 to .98 either way.

Shape legend: N tokens of the text, E hidden features, O/I rows and columns of a matrix, H query heads, G key-value
heads, D features of a head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.parallel import ALONE, Collective

CALIBRATION_TEXT = """The lighthouse stood at the end of the pier, and every evening the keeper climbed its stairs to \
light the lamp. In 1912 a storm carried away the lower landing.

def fibonacci(n):
    a, b = 0, 1
    for _ in range(n):
        a, b = b, a + b
    return a

The capital of France is Paris."""
_LEAST = 1e-5  # of a range, so that features that never speak are left alone


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer before packing; matrices fused along their outputs as in `layers.Layer`."""

    input_norm_E: Tensor
    qkv_OI: Tensor
    qkv_bias_O: Tensor | None
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    attention_out_OI: Tensor
    attention_out_bias_E: Tensor | None
    mlp_norm_E: Tensor
    gate_up_OI: Tensor
    gate_up_bias_O: Tensor | None
    down_OI: Tensor
    down_bias_E: Tensor | None


class Smoother:
    """Carries the text through the layers, in float32 and in order, and smooths each on the way.

    Args:
        hidden_NE: embeddings of the text.
        frequencies_P: of the rotary embedding (P = D / 2).
        group: ranks that hold the other heads and inner features, each smoothing its part of the layers at once.
    """

    def __init__(self, arch: Architecture, hidden_NE: Tensor, frequencies_P: Tensor, group: Collective = ALONE) -> None:
        self._arch = arch
        self._group = group
        self._hidden_NE = hidden_NE.float()
        angles_ND = torch.arange(len(hidden_NE)).float()[:, None] * torch.cat((frequencies_P, frequencies_P))
        self._cos_N1D, self._sin_N1D = angles_ND.cos()[:, None], angles_ND.sin()[:, None]

    def smooth(self, layer: LayerWeights) -> LayerWeights:
        """The next layer with its features resized: the same function, easier to round."""
        arch = self._arch
        q_size, kv_size = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim

        normed_NE = self._norm(self._hidden_NE, layer.input_norm_E)
        attended_NI = self._attend(normed_NE, layer)
        out_NE = functional.linear(attended_NI, layer.attention_out_OI, layer.attention_out_bias_E)
        self._hidden_NE = self._hidden_NE + self._group.sum(out_NE)
        input_norm_E, scales_E = _into_norm(layer.input_norm_E, self._norm_scales(normed_NE, layer.qkv_OI))
        qkv_OI = layer.qkv_OI * scales_E
        groups = (arch.num_kv_heads, arch.num_heads // arch.num_kv_heads, arch.head_dim)
        v_scales_GD = _ratio(
            _largest(attended_NI).view(groups).amax(1), _largest(layer.attention_out_OI).view(groups).amax(1)
        )
        row_scales_O = torch.cat((torch.ones(q_size + kv_size), v_scales_GD.flatten()))
        out_scales_I = v_scales_GD[:, None].expand(groups).flatten()

        normed_NE = self._norm(self._hidden_NE, layer.mlp_norm_E)
        gate_NI, up_NI = functional.linear(normed_NE, layer.gate_up_OI, layer.gate_up_bias_O).chunk(2, -1)
        gated_NI = functional.silu(gate_NI) * up_NI
        down_NE = functional.linear(gated_NI, layer.down_OI, layer.down_bias_E)
        self._hidden_NE = self._hidden_NE + self._group.sum(down_NE)
        mlp_norm_E, scales_E = _into_norm(layer.mlp_norm_E, self._norm_scales(normed_NE, layer.gate_up_OI))
        down_scales_I = _ratio(_largest(gated_NI), _largest(layer.down_OI))
        up_rows_O = torch.cat((torch.ones(arch.intermediate_size), down_scales_I))

        return replace(
            layer,
            input_norm_E=input_norm_E,
            qkv_OI=qkv_OI.div_(row_scales_O[:, None]),
            qkv_bias_O=None if layer.qkv_bias_O is None else layer.qkv_bias_O / row_scales_O,
            attention_out_OI=layer.attention_out_OI * out_scales_I,
            mlp_norm_E=mlp_norm_E,
            gate_up_OI=(layer.gate_up_OI * scales_E).div_(up_rows_O[:, None]),
            gate_up_bias_O=None if layer.gate_up_bias_O is None else layer.gate_up_bias_O / up_rows_O,
            down_OI=layer.down_OI * down_scales_I,
        )

    def _norm_scales(self, normed_NE: Tensor, weight_OI: Tensor) -> Tensor:
        """Of features that every rank multiplies by its own rows: one norm for all."""
        return _ratio(_largest(normed_NE), self._group.maximum(_largest(weight_OI)))

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), weight.float(), self._arch.rms_norm_eps)

    def _attend(self, normed_NE: Tensor, layer: LayerWeights) -> Tensor:
        arch = self._arch
        heads = (arch.num_heads, arch.num_kv_heads, arch.num_kv_heads)
        qkv_NO = functional.linear(normed_NE, layer.qkv_OI, layer.qkv_bias_O)
        q_NHD, k_NGD, v_NGD = qkv_NO.view(len(normed_NE), sum(heads), arch.head_dim).split(heads, 1)
        if layer.q_norm_D is not None and layer.k_norm_D is not None:
            q_NHD, k_NGD = self._norm(q_NHD, layer.q_norm_D), self._norm(k_NGD, layer.k_norm_D)
        q_HND, k_GND = self._rotate(q_NHD).transpose(0, 1), self._rotate(k_NGD).transpose(0, 1)
        attended_HND = functional.scaled_dot_product_attention(
            q_HND[None], k_GND[None], v_NGD.transpose(0, 1)[None], is_causal=True, enable_gqa=True
        )[0]
        return attended_HND.transpose(0, 1).reshape(len(normed_NE), -1)

    def _rotate(self, heads: Tensor) -> Tensor:
        first, second = heads.chunk(2, -1)
        return heads * self._cos_N1D + torch.cat((-second, first), -1) * self._sin_N1D


def _largest(rows: Tensor) -> Tensor:
    return torch.maximum(rows.amax(0), -rows.amin(0))  # no copy of the matrix


def _ratio(activation: Tensor, weight: Tensor) -> Tensor:
    """What each feature is divided by; one on (geometric) average."""
    scales = (activation.clamp_min(_LEAST) / weight.clamp_min(_LEAST)).sqrt()
    return scales / scales.log().mean().exp()


def _into_norm(weight_E: Tensor, scales_E: Tensor) -> tuple[Tensor, Tensor]:
    """The norm's weight divided by the scales and rounded as it will be kept, and the scales that undo just that."""
    divided_E = (weight_E.float() / scales_E).to(torch.bfloat16).float()
    silent_E = divided_E == 0
    return divided_E, torch.where(silent_E, 1.0, weight_E.float() / divided_E.masked_fill(silent_E, 1.0))
