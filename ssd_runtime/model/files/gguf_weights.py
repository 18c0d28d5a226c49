"""Weights from a GGUF file, under Hugging Face names and in Hugging Face layout. Knows no decoder.

Names: https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/tensor_mapping.py
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture, RopeScaling
from ssd_runtime.model.files.fields import Fields, brief
from ssd_runtime.model.files.gguf_header import GgufFile, open_gguf
from ssd_runtime.model.files.source import WHOLE, Part, expected_tensors

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
_ROPE_FACTORS = "rope_freqs.weight"
_UNNEEDED = ".attn_rot_embd."  # follows from the header; llama.cpp leaves it where it is too

# Keys behind the architecture's name that are read here, those that change nothing, and the only values of some others.
# llama.cpp knows more keys than our architectures have: any other is refused.
_KEYS = {
    "num_layers": "block_count",
    "num_heads": "attention.head_count",
    "num_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "factor": "rope.scaling.factor",
    "max_position": "context_length",
    "sliding_window": "attention.sliding_window",
}
_OTHERS_READ = ("attention.value_length", "rope.dimension_count", "rope.scaling.type", "rope.scale_linear")
_HARMLESS = (
    "vocab_size",  # the table says it
    "tensor_data_layout",
    "expert_used_count",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",  # for yarn, as the next ones
    "rope.scaling.yarn_log_multiplier",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
_ONLY: dict[str, float] = {
    "expert_count": 0,
    "use_parallel_residual": False,
    "attention.causal": True,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.scale": 0,  # 0: the usual one
    "logit_scale": 0,  # 0: none, as the next ones
    "residual_scale": 0,
    "embedding_scale": 0,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 0,
}
_CHUNK_VALUES = 1 << 17  # dequantized at a time: temporaries stay in cache, 2 to 4 times as fast as 1 << 20


class GgufWeights:
    """A `WeightSource` over a GGUF file."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: GgufFile = open_gguf(path)
        self.architecture = _architecture(self.file)
        self._check_tensors()

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        tensor = self._dequantize(_gguf_name(name), part)
        permuted = ".self_attn.q_proj." in name or ".self_attn.k_proj." in name
        if self.architecture.family == "llama" and permuted:
            return unpermute(tensor, tensor.shape[0] // self.architecture.head_dim)
        return tensor

    def rope_factors(self) -> Tensor | None:
        return self._dequantize(_ROPE_FACTORS) if _ROPE_FACTORS in self.file.tensors else None

    def _dequantize(self, name: str, part: Part = WHOLE) -> Tensor:
        """Only the blocks that hold the part are touched; the file is mapped."""
        import torch  # here and not above, for the reason given in header.py

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
        """Raise ConfigError for a tensor that is missing, of another shape or kind, or none of this model's."""
        arch, found = self.architecture, self.file.tensors
        expected = {_gguf_name(name): shape for name, shape in expected_tensors(arch).items()}
        if _ROPE_FACTORS in found:
            expected[_ROPE_FACTORS] = (arch.head_dim // 2,)
        for name, shape in expected.items():
            tensor = found.get(name)
            if tensor is None:
                raise ConfigError(f"model {self.path} has no tensor {name}; it is incomplete, fetch it again")
            if tensor.shape != shape:
                raise ConfigError(
                    f"model {self.path}: tensor {name} has shape {tensor.shape}, its header promises {shape}; "
                    "the file is damaged or of another architecture"
                )
            if not _has_values(tensor.kind):
                raise ConfigError(f"model {self.path}: tensor {name} is {tensor.kind.name}; use another quantization")
        for name in found.keys() - expected.keys():
            if _UNNEEDED not in name:
                model = f"a {arch.family} model of {arch.num_layers} layers as its header describes it"
                raise ConfigError(
                    f"model {self.path}: tensor {brief(name)} is none of {model}, and would be left out; "
                    "use a model without it"
                )


@functools.cache
def _has_values(kind: GGMLQuantizationType) -> bool:
    """Whether the library can read this kind as numbers."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


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
    if not isinstance(family, str) or family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ConfigError(f"model {file.path}: GGUF architecture {brief(family)} is not supported; known: {known}")
    fields = Fields(file.metadata, f"model {file.path}", f"{family}.")
    _refuse_unsupported(file, fields)

    table = file.tensors.get("token_embd.weight")
    heads, hidden = fields.integer("attention.head_count"), fields.integer("embedding_length")
    head_dim = fields.integer("attention.key_length", hidden // max(heads, 1))
    for key in ("rope.dimension_count", "attention.value_length"):
        if fields.integer(key, head_dim) != head_dim:
            raise fields.refusal(key, f"{head_dim}, the features of a head; another model is needed")
    arch = Architecture(
        family=family,
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden_size=hidden,
        intermediate_size=fields.integer("feed_forward_length"),
        vocab_size=table.shape[0] if table else 0,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, fields),
        tie_word_embeddings="output.weight" not in file.tensors,
        qkv_bias=family == "qwen2" or "blk.0.attn_q.bias" in file.tensors,
        attention_out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_down.bias" in file.tensors,
        qk_norm=family == "qwen3",
        max_position=fields.integer("context_length"),
        sliding_window=fields.integer("attention.sliding_window", 0) or None,
    )
    keys = _KEYS | {"factor": _factor_key(fields)}
    arch.check(fields.who, {name: fields.prefix + key for name, key in keys.items()})
    return arch


def _refuse_unsupported(file: GgufFile, fields: Fields) -> None:
    kind = file.metadata.get("general.type", "model")
    if not isinstance(kind, str) or kind != "model":
        raise ConfigError(f"model {file.path}: general.type {brief(kind)} is not supported; use a whole model")
    known = {*_KEYS.values(), *_OTHERS_READ, *_HARMLESS}
    for key in file.metadata:
        name = key.removeprefix(fields.prefix)
        if name == key or name in known:
            continue
        value = file.metadata[key]
        if name not in _ONLY or not isinstance(value, int | float) or value != _ONLY[name]:
            raise ConfigError(f"model {file.path}: {key} {brief(value)} is not supported; use another model")


def _rope_scaling(file: GgufFile, fields: Fields) -> RopeScaling | None:
    """As llama.cpp (llama-model.cpp, load_hparams): linear unless said otherwise, and 0 is no factor."""
    kind = "linear" if fields.get("rope.scaling.type") is None else fields.get("rope.scaling.type")
    if not isinstance(kind, str) or kind not in ("none", "linear"):
        raise ConfigError(f"{fields.who}: {fields.prefix}rope.scaling.type {brief(kind)} is not supported; use another")
    factor = fields.number(_factor_key(fields), 0.0) or 1.0
    if kind == "none":
        factor = 1.0
    if _ROPE_FACTORS in file.tensors:
        return RopeScaling("factors", factor=factor)
    return None if factor == 1.0 else RopeScaling("linear", factor=factor)


def _factor_key(fields: Fields) -> str:
    """What the file calls the factor of its rope scaling: the second name is an old one, the first counts."""
    return "rope.scaling.factor" if fields.get("rope.scaling.factor") is not None else "rope.scale_linear"
