"""Weights from a GGUF file, under Hugging Face names and in Hugging Face layout. Knows no decoder.

Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture, RopeScaling
from ssd_runtime.model.gguf_file import GgufFile, open_gguf
from ssd_runtime.model.source import WHOLE, Part, expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llama", "qwen2", "qwen3")
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP_NAMES = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_CHUNK_VALUES = 1 << 17  # dequantized at a time: temporaries stay in cache, 2 to 4 times as fast as 1 << 20


class GgufWeights:
    """A `WeightSource` over a GGUF file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: GgufFile = open_gguf(path)
        self.architecture = _architecture(self.file)
        self._check_tensors()

    def has(self, name: str) -> bool:
        return _gguf_name(name) in self.file.tensors

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        tensor = self._dequantize(_gguf_name(name), part)
        permuted = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        if self.architecture.family == "llama" and permuted:
            return unpermute(tensor, tensor.shape[0] // self.architecture.head_dim)
        return tensor

    def rope_factors(self) -> Tensor | None:
        return self._dequantize("rope_freqs.weight") if "rope_freqs.weight" in self.file.tensors else None

    def _dequantize(self, name: str, part: Part = WHOLE) -> Tensor:
        """Only the blocks that hold the part are touched; the file is mapped."""
        import torch  # here and not above, for the reason given in card.py

        entry, raw = self.file.tensors[name], self.file.raw(name)
        flat = len(entry.shape) == 1  # one row in the file
        columns = (part.rows if flat else part.columns) or (0, entry.shape[-1])
        if part.rows is not None and not flat:
            raw = raw[slice(*part.rows)]
        block, block_bytes = GGML_QUANT_SIZES[entry.kind]
        first, last = columns[0] // block, -(-columns[1] // block)
        raw = raw[:, first * block_bytes : last * block_bytes]
        kept = slice(columns[0] - first * block, columns[1] - first * block)
        out = np.empty((raw.shape[0], columns[1] - columns[0]), np.float32)
        step = max(1, _CHUNK_VALUES // max(1, (last - first) * block))
        for row in range(0, len(out), step):
            blocks = np.ascontiguousarray(raw[row : row + step])
            out[row : row + step] = dequantize(blocks, entry.kind)[:, kept]
        return torch.from_numpy(out.reshape(-1) if flat else out)

    def _check_tensors(self) -> None:
        for name, shape in expected_tensors(self.architecture).items():
            tensor = self.file.tensors.get(_gguf_name(name))
            if tensor is None:
                raise ConfigError(
                    f"model {self.path} has no tensor {_gguf_name(name)}; it is incomplete, fetch it again"
                )
            if tensor.shape != shape:
                raise ConfigError(
                    f"model {self.path}: tensor {tensor.name} has shape {tensor.shape}, its header promises {shape}; "
                    "the file is damaged or of another architecture"
                )


def unpermute(weight: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of rotary pairs: feature 2i + j of a head goes back to j * D/2 + i."""
    pairs = weight.reshape(num_heads, weight.shape[0] // num_heads // 2, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    _, layer, part = stem.split(".", 2)
    return f"blk.{layer}.{_NAMES[part]}.{suffix}"


def _architecture(file: GgufFile) -> Architecture:
    family = file.metadata.get("general.architecture")
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"model {file.path}: GGUF architecture {family!r} is not supported; known: {known}")

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{family}.{key}", default)
        if value is None:
            raise ConfigError(f"model {file.path}: key {family}.{key} is missing; it is incomplete, fetch it again")
        return value

    def tensor_rows(name: str) -> int:
        return file.tensors[name].shape[0] if name in file.tensors else 0

    if get("expert_count", 0):
        raise ConfigError(f"model {file.path} is a mixture of experts, which is not supported; use a dense model")
    num_heads, hidden = get("attention.head_count"), get("embedding_length")
    if not isinstance(num_heads, int) or not isinstance(get("feed_forward_length"), int):
        raise ConfigError(f"model {file.path}: heads or widths that differ by layer are not supported")
    head_dim = get("attention.key_length", hidden // max(num_heads, 1))
    if get("rope.dimension_count", head_dim) != head_dim or get("attention.value_length", head_dim) != head_dim:
        raise ConfigError(f"model {file.path}: a partial rotary embedding or values of another size are not supported")
    arch = Architecture(
        family=family,
        num_layers=get("block_count"),
        num_heads=num_heads,
        num_kv_heads=get("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=get("feed_forward_length"),
        vocab_size=tensor_rows("token_embd.weight"),
        rms_norm_eps=float(get("attention.layer_norm_rms_epsilon")),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(file, family),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        max_position=get("context_length"),
        sliding_window=file.metadata.get(f"{family}.attention.sliding_window") or None,
    )
    arch.check(f"model {file.path}")
    return arch


def _rope_scaling(file: GgufFile, family: str) -> RopeScaling | None:
    if "rope_freqs.weight" in file.tensors:
        return RopeScaling("factors")
    kind = file.metadata.get(f"{family}.rope.scaling.type", "none")
    if kind == "linear":
        return RopeScaling("linear", factor=float(file.metadata.get(f"{family}.rope.scaling.factor", 1.0)))
    if kind != "none":
        raise ConfigError(f"model {file.path}: rope scaling {kind!r} is not supported; known: none, linear, llama3")
    return None
