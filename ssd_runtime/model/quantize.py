"""Linear layers in the four dtypes a model can be loaded in. Knows no model."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ext import ops
from ssd_runtime.config import Dtype, runs_on
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.decoder import Linear, PackedLinear, PlainLinear


def check_dtype(dtype: Dtype, device: torch.device) -> None:
    """Raise ConfigError when this dtype does not run on this device."""
    if not runs_on(dtype, device.type):
        raise ConfigError(f"dtype {dtype} runs on the CPU only, not on {device.type}; use bf16 there")


def activation_dtype(dtype: Dtype) -> torch.dtype:
    """What flows between the layers, and what the KV cache holds."""
    return torch.float32 if dtype == "fp32" else torch.bfloat16


def make_linear(weight_OI: Tensor, bias_O: Tensor | None, dtype: Dtype, device: torch.device) -> Linear:
    """A linear layer that computes in `dtype`: NI -> NO in the activations' dtype.

    On a GPU it is F.linear, with these very weights if they are there and in that dtype. On the CPU weights are packed;
    int8 has one scale per output channel and quantizes its input by row; int4 has a scale and a minimum per 32 input
    features, and quantizes its input to int8 in the same groups. With the compiled operators a row's result does not
    depend on the rows beside it.
    """
    check_dtype(dtype, device)
    if device.type != "cpu":
        kind = activation_dtype(dtype)
        return PlainLinear(weight_OI.to(device, kind).contiguous(), None if bias_O is None else bias_O.to(device, kind))
    if dtype == "fp32":
        return PackedLinear(dtype, ops.pack_fp32(weight_OI), None if bias_O is None else bias_O.float())
    if dtype == "bf16":
        return PackedLinear(dtype, ops.pack_bf16(weight_OI), None if bias_O is None else bias_O.to(torch.bfloat16))
    packed = ops.pack_int8(weight_OI.float()) if dtype == "int8" else ops.pack_grouped(weight_OI, bits=4)
    return PackedLinear(dtype, packed, None if bias_O is None else bias_O.float())


def make_head(weight_VE: Tensor, dtype: Dtype, device: torch.device) -> Linear:
    """The last layer: as `make_linear`, but a model in int4 keeps 8 bits there, in groups too.

    With SmolLM2's head in 4 bits the greedy token of bf16 is met at .88 of the positions of its text instead of .96.
    """
    check_dtype(dtype, device)
    if dtype == "int4":
        return PackedLinear(dtype, ops.pack_grouped(weight_VE, bits=8), None)
    return make_linear(weight_VE, None, dtype, device)
