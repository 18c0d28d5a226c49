"""The special tokens of a model by name, as its files name them. Knows no tokenizer and no template.

What transformers calls `special_tokens_map`; a name whose token is null, or that nobody names, is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ssd_runtime.errors import ConfigError

if TYPE_CHECKING:
    from ssd_runtime.model.files.gguf_header import GgufFile

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_CLASS = {  # what transformers' tokenizer classes assume where tokenizer_config.json is silent
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}
_OF_GGUF = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_NO_TOKEN = (-1, (1 << 32) - 1)  # how converters write that there is none


def special_tokens_hf(
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    special_tokens_map: Mapping[str, Any],
    byte_level: bool,
    who: str,
) -> dict[str, str]:
    """Text by name, from config.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        byte_level: whether tokenizer.json is of that kind; transformers' class for Llama is not, and is not taken then.

    Raises:
        ConfigError: something else than a token is named; `who` begins the message.
    """
    named = _class_tokens(config, tokenizer_config, byte_level)
    named |= {name: tokenizer_config[name] for name in NAMES if name in tokenizer_config}
    if "added_tokens_decoder" not in tokenizer_config:  # written before there was one
        named |= {name: special_tokens_map[name] for name in NAMES if name in special_tokens_map}
    return {name: _text(token, name, who) for name, token in named.items() if token is not None}


def special_ids_gguf(file: GgufFile, num_tokens: int) -> dict[str, int]:
    """Id by name. Raises ConfigError for an id that no token has."""
    ids = {name: gguf_token_id(file, key, num_tokens) for name, key in _OF_GGUF.items()}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


def gguf_token_id(file: GgufFile, key: str, num_tokens: int) -> int | None:
    """What `tokenizer.ggml.<key>` names, if anything. Raises ConfigError for an id that no token has."""
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    if value is None or (type(value) is int and value in _NO_TOKEN):
        return None
    if type(value) is not int or not 0 <= value < num_tokens:
        raise ConfigError(
            f"model {file.path}: tokenizer.ggml.{key} is {value!r:.40}, not one of its {num_tokens} tokens; "
            "convert the model again, with its tokenizer"
        )
    return value


def _class_tokens(config: Mapping[str, Any], tokenizer_config: Mapping[str, Any], byte_level: bool) -> dict[str, Any]:
    """Of the class transformers takes for this model (AutoTokenizer)."""
    family, name = config.get("model_type"), tokenizer_config.get("tokenizer_class")
    name = name.removesuffix("Fast") if isinstance(name, str) else None
    if family == "qwen2" or (family == "qwen3" and name is None):
        name = "Qwen2Tokenizer"
    elif family == "mistral" or (name == "LlamaTokenizer" and byte_level):
        name = None
    return dict(_OF_CLASS.get(name or "", {}))


def _text(token: Any, name: str, who: str) -> str:
    """A token of tokenizer_config.json: a string, or an object with its content."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ConfigError(f"{who}: {name} in tokenizer_config.json is {token!r:.40}, not a token; fetch it again")
    return text
