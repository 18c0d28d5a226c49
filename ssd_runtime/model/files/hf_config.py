"""What a config.json says of a model, read as transformers 5 reads it. Knows no tensors.

Every key that changes the mathematics of our families there is honoured, or refused by name unless it has the value
that leaves them alone. The others are not looked at: a test lists them, and records what transformers looks at.
Classes: https://github.com/huggingface/transformers/tree/main/src/transformers/models
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture, RopeScaling
from ssd_runtime.model.files.fields import Fields, brief


@dataclass(frozen=True)
class _Family:
    """What the config class of a family takes for a key that is missing, and which keys it has.

    Attributes:
        kv_heads: None for as many as query heads.
        head_dim: None for hidden features over heads.
        window: tokens a row sees.
        layered: whether windows go by layer, and only where `use_sliding_window` says so.
        qkv_bias: whether it has one in any case.
        biases: keys that switch biases on.
    """

    kv_heads: int | None = None
    head_dim: int | None = None
    max_position: int = 2048
    window: int | None = None
    layered: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    biases: tuple[str, ...] = ()


FAMILIES = {
    "llama": _Family(biases=("attention_bias", "mlp_bias")),
    "qwen2": _Family(kv_heads=32, max_position=32768, window=4096, layered=True, qkv_bias=True),
    "qwen3": _Family(
        kv_heads=32,
        head_dim=128,
        max_position=32768,
        window=4096,
        layered=True,
        qk_norm=True,
        biases=("attention_bias",),
    ),
    "mistral": _Family(kv_heads=8, max_position=131072, window=4096),
}
_MAX_WINDOW_LAYERS = 28  # where the key is missing
_LAYER_TYPES = ("full_attention", "sliding_attention")

# The only values of keys that change the mathematics and are not honoured; null and a missing key are always fine.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "partial_rotary_factor": (1.0,),
    **dict.fromkeys(("attention_chunk_size", "kv_sharing_modes", "per_layer_config", "quantization_config"), ()),
    **dict.fromkeys(("decoder", "generator", "text_config", "text_encoder", "_rope_type_labels"), ()),
}
_NOT_NULL = ("hidden_act", "is_causal")  # null is no activation, and false

_KEYS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position": "max_position_embeddings",
    "original_max_position": "original_max_position_embeddings",
}


def architecture_from_config(config: Mapping[str, Any], who: str) -> Architecture:
    """Read config.json of transformers 4 or 5; raises ConfigError naming the key that is missing or not supported."""
    fields = Fields(config, f"{who}: config.json")
    name = config.get("model_type")
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise ConfigError(f"{fields.who}: model_type {brief(name)} is not supported; known: {', '.join(FAMILIES)}")
    _refuse_unsupported(fields)
    heads, hidden, layers = (fields.integer(key) for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"))
    theta, scaling = _rope(fields, family)
    attention_bias, mlp_bias = (
        key in family.biases and fields.flag(key, False) for key in ("attention_bias", "mlp_bias")
    )
    arch = Architecture(
        family=str(name),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=_nullable(fields, "num_key_value_heads", family.kv_heads, heads),
        head_dim=_nullable(fields, "head_dim", family.head_dim, hidden // max(heads, 1)),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=family.qkv_bias or attention_bias,
        attention_out_bias=attention_bias,
        mlp_bias=mlp_bias,
        qk_norm=family.qk_norm,
        max_position=fields.integer("max_position_embeddings", family.max_position),
        sliding_window=_window(fields, family, layers),
    )
    arch.check(fields.who, _KEYS)
    return arch


def _refuse_unsupported(fields: Fields) -> None:
    for key, allowed in _ONLY.items():
        value = fields.get(key)
        null_is_fine = value is None and not (key in _NOT_NULL and fields.has(key))
        if not null_is_fine and value not in allowed:
            remedy = "use the original weights, or a GGUF file" if key == "quantization_config" else "use another model"
            raise ConfigError(f"{fields.who}: {key} {brief(value)} is not supported; {remedy}")


def _nullable(fields: Fields, key: str, missing: int | None, null: int) -> int:
    """A number that may be null, which is also what a missing key without a default is."""
    if fields.get(key) is not None:
        return fields.integer(key)
    return null if fields.has(key) or missing is None else missing


def _rope(fields: Fields, family: _Family) -> tuple[float, RopeScaling | None]:
    """Base and scaling. `rope_scaling` replaces `rope_parameters`, whose base comes before the one beside it."""
    key = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    values = {} if fields.get(key) is None else fields.get(key)
    if not isinstance(values, dict):
        raise fields.refusal(key, "an object")
    rope = Fields(values, f"{fields.who}: {key}")
    if any(isinstance(value, dict) for value in values.values()):
        raise ConfigError(f"{rope.who} {brief(values)} differs by layer, which is not supported; use another model")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise rope.refusal("partial_rotary_factor", "1, the only one supported")
    theta = rope.number("rope_theta") if rope.has("rope_theta") else fields.number("rope_theta", 10000.0)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", factor=rope.number("factor"))
    if kind != "llama3":
        raise ConfigError(f"{rope.who}: rope_type {brief(kind)} is not supported; known: default, linear, llama3")
    original = "original_max_position_embeddings"
    made_for = fields.integer("max_position_embeddings", family.max_position)
    return theta, RopeScaling(
        "llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=fields.integer(original) if fields.has(original) else rope.integer(original, made_for),
    )


def _window(fields: Fields, family: _Family, num_layers: int) -> int | None:
    """The sliding window, if a layer has one."""
    window = family.window if not fields.has("sliding_window") else fields.get("sliding_window")
    if window is not None:
        window = fields.integer("sliding_window", family.window)
    types = fields.get("layer_types")
    if types is not None and not (isinstance(types, list) and all(kind in _LAYER_TYPES for kind in types)):
        raise fields.refusal("layer_types", f"a list of {' and '.join(_LAYER_TYPES)}")
    slides = types is not None and "sliding_attention" in types
    if not family.layered:
        if slides:
            raise fields.refusal("layer_types", "full_attention in every layer, as this family has it")
        return window
    if not fields.flag("use_sliding_window", False):
        window = None
    if types is None:
        slides = num_layers > fields.integer("max_window_layers", _MAX_WINDOW_LAYERS)
    elif len(types) != num_layers or (slides and window is None):
        raise fields.refusal("layer_types", f"what num_hidden_layers {num_layers} and sliding_window {window} allow")
    return window if slides else None
