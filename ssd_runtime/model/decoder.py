"""The decoder of the Llama family over a paged KV cache. Knows no sequences, no sampling, no files.

Shape legend: N rows, R rows whose logits are wanted, V vocabulary, E hidden features, H query heads, G key-value heads,
D features of a head, P = D / 2, I/O features in and out of a linear layer, L layers, S slots. In a part of a
tensor-parallel model H, G and V count what this rank holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from cuda_ext import ops
from ssd_runtime.config import Dtype
from ssd_runtime.model.architecture import Architecture, RopeScaling
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.parallel import Shard
from ssd_runtime.speculation.sampling.ranking import Choice, choose, count_rows

Linear = Callable[[Tensor], Tensor]  # NI -> NO, in the dtype of its input; made by `quantize.make_linear`
L = TypeVar("L", bound=Linear, covariant=True)


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A linear layer on the CPU: weights packed for `cuda_ext.ops`, of the kind in which they are stored."""

    kind: Dtype
    packed: Any  # PackedFloat, PackedInt8 or PackedGrouped of cuda_ext/reference/weights.py
    bias_O: Tensor | None

    def __call__(self, x_NI: Tensor) -> Tensor:
        if self.kind == "fp32":
            return ops.linear_fp32(x_NI, self.packed, self.bias_O)
        if self.kind == "bf16":
            return ops.linear_bf16(x_NI, self.packed, self.bias_O)
        if self.kind == "int8":
            return ops.linear_int8(x_NI, self.packed, self.bias_O)
        return ops.linear_grouped(x_NI, self.packed, self.bias_O)


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A linear layer in plain torch, as GPUs have it and as all are read."""

    weight_OI: Tensor
    bias_O: Tensor | None

    def __call__(self, x_NI: Tensor) -> Tensor:
        return functional.linear(x_NI, self.weight_OI, self.bias_O)


@dataclass(frozen=True, slots=True)
class Layer(Generic[L]):
    """One decoder layer, as it computes or, of plain linear layers, as it was read.

    `qkv` and `gate_up` are fused along their outputs.
    """

    input_norm_I: Tensor
    qkv: L
    q_norm_D: Tensor | None
    k_norm_D: Tensor | None
    attention_out: L
    mlp_norm_I: Tensor
    gate_up: L
    down: L


class Decoder:
    """One loaded model.

    Args:
        embedding_VE: the embedding table, in the dtype of the activations.
        layers: from first to last.
        norm_E: weight of the last norm.
        lm_head: hidden features to logits.
        frequencies_P: of the rotary embedding, on the CPU or the device.
        shard: which part of a tensor-parallel model this is, with `arch` describing the part; None for a whole one.

    Attributes:
        shard: the same.
    """

    def __init__(
        self,
        arch: Architecture,
        embedding_VE: Tensor,
        layers: Sequence[Layer],
        norm_E: Tensor,
        lm_head: Linear,
        frequencies_P: Tensor,
        shard: Shard | None = None,
    ) -> None:
        self.arch = shard.plan.arch if shard else arch  # of the whole model
        self._part = arch
        self.shard = shard
        self.device = embedding_VE.device
        self.dtype = embedding_VE.dtype
        self._embedding_VE = embedding_VE
        self._layers = tuple(layers)
        self._norm_E = norm_E
        self._lm_head = lm_head
        self._frequencies_D = torch.cat((frequencies_P, frequencies_P)).to(self.device)
        self._scale = arch.head_dim**-0.5
        self._packed = None if shard else _pack(arch, self._layers, norm_E)

    @property
    def row_invariant(self) -> bool:
        """Whether a row's result is the same to the bit whatever other rows share its forward, and in whatever place.

        The compiled operators promise it on the CPU. Plain torch picks kernels by shape, on every device.
        """
        return self.device.type == "cpu" and ops.backend() == "compiled"

    def new_kv(self, num_slots: int) -> Tensor:
        """An empty KV pool: [layer, 2, slot, kv_head, dim] in the activations' dtype, zeros."""
        arch = self._part
        shape = (arch.num_layers, 2, num_slots, arch.num_kv_heads, arch.head_dim)
        return ops.new_cache(shape, self.dtype, self.device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        """Logits of the wanted rows, float32 (RV). Writes keys and values of every row into its slot."""
        logits = self.forward_part(batch, kv_L2SGD)
        if self.shard is None:
            return logits
        if len(logits) == 0:
            return logits.new_empty(0, self.arch.vocab_size)
        return self.shard.whole_rows(logits)

    def choose(self, batch: ForwardBatch, kv_L2SGD: Tensor, choices: Sequence[Choice], first_row: int = 0) -> list[int]:
        """A forward, and the tokens chosen at its wanted rows from `first_row` on; the others' logits are dropped."""
        logits_RV = self.forward(batch, kv_L2SGD)
        return choose(logits_RV[first_row : first_row + count_rows(choices)], choices)

    @torch.inference_mode()
    def forward_part(self, batch: ForwardBatch, kv_L2SGD: Tensor) -> Tensor:
        """As `forward`, but of the logits what this rank has, padding included."""
        angles_ND = batch.positions_N.float()[:, None] * self._frequencies_D
        cos_ND, sin_ND = angles_ND.cos(), angles_ND.sin()
        if self._packed is None:
            x_RE = self._walk(batch, cos_ND, sin_ND, kv_L2SGD)
        else:
            x_RE = ops.decoder_layers_(
                self._packed,
                self._embedding_VE,
                batch.tokens_N,
                cos_ND,
                sin_ND,
                kv_L2SGD,
                batch.slots_N,
                batch.sequence_N,
                batch.tables_SC,
                batch.prefix_N,
                batch.chain_ND,
                batch.logit_rows_R,
                self._scale,
            )
        if len(x_RE) == 0:
            return torch.empty(0, self._part.vocab_size, device=self.device)
        logits: Tensor = self._lm_head(x_RE).float()
        return logits

    def check(self) -> None:
        """Nothing can be gone that this process does not need for a forward anyway."""

    def settle(self) -> None:
        """Return when the forwards so far have happened, raising PeerLost where a rank of the group is gone."""
        if self.shard is not None:
            self.shard.group.settle()

    def _walk(self, batch: ForwardBatch, cos_ND: Tensor, sin_ND: Tensor, kv_L2SGD: Tensor) -> Tensor:
        """The layers operator by operator: the wanted rows after the last norm (RE)."""
        arch, eps, shard = self._part, self._part.rms_norm_eps, self.shard
        num_heads, num_kv_heads, head_dim = arch.num_heads, arch.num_kv_heads, arch.head_dim
        num_rows, last = len(batch.tokens_N), len(self._layers) - 1
        if shard is None:
            residual_NE = self._embedding_VE.index_select(0, batch.tokens_N)
        else:
            residual_NE = shard.embed(self._embedding_VE, batch.tokens_N)
        x_NE = ops.rms_norm(residual_NE, self._layers[0].input_norm_I, eps)
        for index, (layer, kv_2SGD) in enumerate(zip(self._layers, kv_L2SGD.unbind(0), strict=True)):
            if index:
                x_NE, residual_NE = ops.add_rms_norm(x_NE, residual_NE, layer.input_norm_I, eps)
            qkv_NHD = layer.qkv(x_NE).view(num_rows, num_heads + 2 * num_kv_heads, head_dim)
            q_NHD, k_NGD, v_NGD = qkv_NHD.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
            if layer.q_norm_D is not None and layer.k_norm_D is not None:
                q_NHD = ops.rms_norm(q_NHD.reshape(-1, head_dim), layer.q_norm_D, eps).view(q_NHD.shape)
                k_NGD = ops.rms_norm(k_NGD.reshape(-1, head_dim), layer.k_norm_D, eps).view(k_NGD.shape)
            ops.rope_write_(q_NHD, k_NGD, v_NGD, cos_ND, sin_ND, kv_2SGD, batch.slots_N)
            attended_NHD = ops.paged_attention(
                q_NHD,
                kv_2SGD,
                batch.sequence_N,
                batch.tables_SC,
                batch.prefix_N,
                batch.chain_ND,
                self._scale,
                batch.spans,
            )
            x_NE = attended_NHD.reshape(num_rows, num_heads * head_dim)
            if index == last and batch.logit_rows_R is not None:  # the other rows have left their keys and values
                if len(batch.logit_rows_R) == 0:
                    return residual_NE[:0]
                x_NE = x_NE.index_select(0, batch.logit_rows_R)
                residual_NE = residual_NE.index_select(0, batch.logit_rows_R)
            x_NE = layer.attention_out(x_NE)
            if shard is not None:
                x_NE = shard.group.sum(x_NE)
            x_NE, residual_NE = ops.add_rms_norm(x_NE, residual_NE, layer.mlp_norm_I, eps)
            x_NE = layer.down(ops.silu_mul(layer.gate_up(x_NE)))
            if shard is not None:
                x_NE = shard.group.sum(x_NE)
        x_RE, _ = ops.add_rms_norm(x_NE, residual_NE, self._norm_E, eps)
        return x_RE


def _pack(arch: Architecture, layers: Sequence[Layer], norm_E: Tensor) -> ops.DecoderWeights | None:
    """The layers for one call of the compiled operator; None where they have to be walked: plain torch and GPUs."""
    first = layers[0].qkv
    if not isinstance(first, PackedLinear) or ops.backend() != "compiled":
        return None

    def packed(linears: Iterable[Linear]) -> tuple[Tensor, ...]:
        return tuple(linear.packed.data for linear in linears if isinstance(linear, PackedLinear))

    def stacked(vectors: Iterable[Tensor | None]) -> Tensor | None:
        present = [vector for vector in vectors if vector is not None]
        return torch.stack(present) if present else None

    def biases(linears: Iterable[Linear]) -> Tensor | None:
        return stacked(linear.bias_O for linear in linears if isinstance(linear, PackedLinear))

    norms_ME = stacked([norm for layer in layers for norm in (layer.input_norm_I, layer.mlp_norm_I)] + [norm_E])
    assert norms_ME is not None
    return ops.DecoderWeights(
        kind=first.kind,
        num_heads=arch.num_heads,
        intermediate_size=arch.intermediate_size,
        eps=arch.rms_norm_eps,
        norms_ME=norms_ME,
        head_norms_MD=stacked(norm for layer in layers for norm in (layer.q_norm_D, layer.k_norm_D)),
        qkv=packed(layer.qkv for layer in layers),
        qkv_bias_LO=biases(layer.qkv for layer in layers),
        attention_out=packed(layer.attention_out for layer in layers),
        attention_out_bias_LE=biases(layer.attention_out for layer in layers),
        gate_up=packed(layer.gate_up for layer in layers),
        gate_up_bias_LI=biases(layer.gate_up for layer in layers),
        down=packed(layer.down for layer in layers),
        down_bias_LE=biases(layer.down for layer in layers),
    )


def rope_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None, factors_P: Tensor | None = None
) -> Tensor:
    """Angle per position of each rotary pair, float32 (P).

    The llama3 rule: https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py (apply_scaling).
    """
    exponents_P = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies_P = 1.0 / (theta**exponents_P)
    if scaling is None:
        return frequencies_P
    if scaling.kind == "linear":
        return frequencies_P / scaling.factor
    if scaling.kind == "factors":
        assert factors_P is not None
        return frequencies_P / (factors_P * scaling.factor)
    wavelengths_P = 2 * math.pi / frequencies_P
    low, high, original = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position
    smooth_P = ((original / wavelengths_P - low) / (high - low)).clamp(0, 1)
    return (1 - smooth_P) * frequencies_P / scaling.factor + smooth_P * frequencies_P
