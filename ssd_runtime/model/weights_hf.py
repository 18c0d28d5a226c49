"""Weights from a Hugging Face directory: config.json and safetensors, whole or sharded. Knows no decoder.

Safetensors layout: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture, RopeScaling
from ssd_runtime.model.source import WHOLE, Part, expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")
_ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}
_LARGEST_HEADER = 100_000_000  # bytes, the format's own limit


class HfWeights:
    """A `WeightSource` over a Hugging Face directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.architecture = architecture_from_config(read_json(Path(path) / "config.json"), f"model {path}")
        self._files: dict[str, Any] = {}  # opened safetensors by file
        self._where = _check_tensors(Path(path), self.architecture)

    def has(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        file, stored_name = self._where[name]
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            stored = self._files[file].get_slice(stored_name)
            rows, columns = (slice(*span) if span else slice(None) for span in (part.rows, part.columns))
            tensor: Tensor = stored[rows] if len(stored.get_shape()) == 1 else stored[rows, columns]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read tensor {name} of {file}: {error}; fetch the model again") from None
        return tensor

    def rope_factors(self) -> Tensor | None:
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model directory; raises ConfigError when it is missing or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; a model directory needs this file") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object; fetch the model again")
    return value


def architecture_from_config(config: dict[str, Any], who: str) -> Architecture:
    """Read config.json of transformers 4 or 5; raises ConfigError naming what is missing or not supported."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ConfigError(f"{who}: model_type {family!r} is not supported; known: {', '.join(FAMILIES)}")
    _refuse_unsupported(config, who)
    try:
        num_heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        arch = Architecture(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            num_heads=num_heads,
            num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
            head_dim=int(config.get("head_dim") or hidden // max(num_heads, 1)),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            vocab_size=int(config["vocab_size"]),
            rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(config.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            rope_scaling=_rope_scaling(rope, who),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bool(config.get("attention_bias", False)),
            qk_norm=family == "qwen3",
            max_position=int(config.get("max_position_embeddings", 2048)),
            sliding_window=_sliding_window(config, family),
        )
    except KeyError as error:
        raise ConfigError(f"{who}: config.json has no {error.args[0]!r}; fetch the model again") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{who}: config.json holds an ill-typed value ({error}); fetch the model again") from None
    arch.check(who)
    return arch


def _refuse_unsupported(config: dict[str, Any], who: str) -> None:
    if config.get("quantization_config"):
        raise ConfigError(f"{who}: quantized checkpoints are not supported; use the original weights, or a GGUF file")
    if config.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{who}: activation {config['hidden_act']!r} is not supported, only 'silu'")
    if config.get("mlp_bias"):
        raise ConfigError(f"{who}: biases in the MLP are not supported")
    if config.get("partial_rotary_factor", 1.0) not in (None, 1.0):
        raise ConfigError(f"{who}: a partial rotary embedding is not supported")


def _rope_scaling(rope: dict[str, Any], who: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            "llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_max_position=int(rope["original_max_position_embeddings"]),
        )
    raise ConfigError(f"{who}: rope scaling {kind!r} is not supported; known: default, linear, llama3")


def _sliding_window(config: dict[str, Any], family: str) -> int | None:
    window = config.get("sliding_window")
    if family in ("qwen2", "qwen3") and not config.get("use_sliding_window", False):
        return None
    return int(window) if window else None


def _check_tensors(directory: Path, arch: Architecture) -> dict[str, tuple[str, str]]:
    """Find every tensor; returns name -> (file, name in the file).

    Raises:
        ConfigError: missing or truncated file, missing tensor, another shape than config.json promises.
    """
    headers: dict[str, dict[str, Any]] = {}
    where: dict[str, tuple[str, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _shards(directory):
        headers[file] = read_safetensors_header(file)
        for stored_name, entry in headers[file].items():
            name = stored_name.removeprefix("model.")
            where[name], shapes[name] = (file, stored_name), tuple(entry["shape"])
    for name, shape in expected_tensors(arch).items():
        if name not in where:
            raise ConfigError(f"model {directory} has no tensor {name}; the download is incomplete, fetch it again")
        if shapes[name] != shape:
            found = f"tensor {name} has shape {shapes[name]}, config.json promises {shape}"
            raise ConfigError(f"model {directory}: {found}; the files are of different models, fetch it again")
    return where


def _shards(directory: Path) -> list[str]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [str(single)]
    if not index.exists():
        raise ConfigError(f"model {directory} has no model.safetensors (nor an index of shards); fetch its safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map; fetch the model again")
    return [str(directory / name) for name in sorted(set(map(str, weight_map.values())))]


def read_safetensors_header(file: str) -> dict[str, Any]:
    """Name -> {dtype, shape, data_offsets}, checked against the size of the file. Raises ConfigError."""
    try:
        size = Path(file).stat().st_size
        with open(file, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if size < 8 or header_bytes > min(size - 8, _LARGEST_HEADER):
                raise ConfigError(f"{file} is truncated or not safetensors ({size} bytes); fetch the model again")
            header = json.loads(stream.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] not in _ITEM_BYTES:
                raise ConfigError(f"{file}: tensor {name} is {entry['dtype']}; known: {', '.join(_ITEM_BYTES)}")
            if end - start != math.prod(entry["shape"]) * _ITEM_BYTES[entry["dtype"]] or start < 0:
                raise ConfigError(f"{file}: tensor {name} has an impossible size; fetch the model again")
            if 8 + header_bytes + end > size:
                raise ConfigError(
                    f"{file} is truncated: tensor {name} ends at byte {8 + header_bytes + end}, the file has {size}; "
                    "fetch the model again"
                )
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}; it is incomplete, fetch the model again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} has a damaged header ({error}); fetch the model again") from None
    assert isinstance(header, dict)
    return header
