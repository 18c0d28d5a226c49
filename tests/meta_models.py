"""Decoders on the meta device, which follow a forward of any shape without numbers; a watch over what is done there.

On that device every read of a value by the host raises by itself. It stands for any device that is not the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.decoder import Decoder, Layer, Linear, rope_frequencies
from ssd_runtime.model.parallel import Shard, ShardPlan
from ssd_runtime.model.quantize import activation_dtype, make_linear
from tests.operator_watch import OperatorWatch

META = torch.device("meta")
KIND = activation_dtype("bf16")


def meta_decoder(arch: Architecture, shard: Shard | None = None) -> Decoder:
    """A decoder in bf16 without weights; with a shard, of that part."""
    part = shard.plan.local if shard else arch

    def vector(size: int) -> Tensor:
        return torch.empty(size, device=META, dtype=KIND)

    def linear(outputs: int, inputs: int, bias: bool = False) -> Linear:
        weight_OI = torch.empty(outputs, inputs, device=META, dtype=KIND)
        return make_linear(weight_OI, vector(outputs) if bias else None, "bf16", META)

    heads, kv_heads, hidden = part.num_heads * part.head_dim, part.num_kv_heads * part.head_dim, part.hidden_size
    layers = [
        Layer(
            input_norm_I=vector(hidden),
            qkv=linear(heads + 2 * kv_heads, hidden, part.qkv_bias),
            q_norm_D=vector(part.head_dim) if part.qk_norm else None,
            k_norm_D=vector(part.head_dim) if part.qk_norm else None,
            attention_out=linear(hidden, heads, part.attention_out_bias),
            mlp_norm_I=vector(hidden),
            gate_up=linear(2 * part.intermediate_size, hidden, part.mlp_bias),
            down=linear(hidden, part.intermediate_size, part.mlp_bias),
        )
        for _ in range(part.num_layers)
    ]
    embedding_VE = torch.empty(part.vocab_size, hidden, device=META, dtype=KIND)
    frequencies_P = rope_frequencies(part.head_dim, part.rope_theta, None)
    return Decoder(part, embedding_VE, layers, vector(hidden), linear(part.vocab_size, hidden), frequencies_P, shard)


class Alike:
    """A group whose ranks all have what this one has: shapes are right."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: Tensor) -> Tensor:
        return torch.stack([x] * self.size)

    def sum(self, x: Tensor) -> Tensor:
        return self.gather(x.float()).sum(0).to(x.dtype)

    def maximum(self, x: Tensor) -> Tensor:
        return self.gather(x).amax(0)

    def settle(self) -> None:
        pass


def meta_part(arch: Architecture, rank: int, size: int) -> Decoder:
    """One rank's part of a tensor-parallel decoder."""
    return meta_decoder(arch, Shard(ShardPlan(arch, rank, size), Alike(rank, size)))


class MixedDevices(Exception):
    """Tensors of two devices met in an operator: at best the device's queue is waited for, to copy one of them."""


class _OneDevice(OperatorWatch):
    """Raises MixedDevices; torch itself lets indices on the CPU pass, and numbers in tensors.

    Attributes:
        uploads: copies from the host.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uploads = 0

    def watched(self, func: Any, given: object, result: object) -> None:
        met, made = _devices(given), _devices(result)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.uploads += (met | made) == {"cpu", "meta"}
        elif len(met) > 1:
            raise MixedDevices(f"{func} of tensors on {' and '.join(sorted(met))}")


class _Making(TorchFunctionMode):
    """Counts tensors made of Python's numbers, whose copy to the device no operator shows."""

    def __init__(self, watch: _OneDevice) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[object] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        self._watch.uploads += func in (torch.tensor, Tensor.new_tensor) and result.device == META
        return result


def watched(work: Callable[[], Any]) -> tuple[Any, int]:
    """What it returns, and how often something was copied to the device; raises MixedDevices."""
    with _OneDevice() as watch, _Making(watch):
        return work(), watch.uploads


def _devices(tree: object) -> set[str]:
    return {leaf.device.type for leaf in tree_iter(tree) if isinstance(leaf, Tensor)}
