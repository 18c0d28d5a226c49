"""The parts of a decoder layer as plain objects (no nn.Module: its call costs as much as a small linear).

Knows no files. Shape legend: N rows, I/O features in and out, D features of a head, P = D / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ssd_runtime.model.architecture import RopeScaling

Linear = Callable[[Tensor], Tensor]  # NI -> NO, in the dtype of its input; made by `quantize.make_linear`
L = TypeVar("L", bound=Linear, covariant=True)


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
