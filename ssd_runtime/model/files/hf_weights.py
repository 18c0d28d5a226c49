"""Weights from a Hugging Face directory: config.json and safetensors, whole or sharded. Knows no decoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.architecture import Architecture
from ssd_runtime.model.files.fields import brief_error
from ssd_runtime.model.files.hf_config import architecture_from_config
from ssd_runtime.model.files.opening import file_size, look, read_json, unreadable
from ssd_runtime.model.files.source import WHOLE, Part, expected_tensors

if TYPE_CHECKING:
    from torch import Tensor

_DTYPES = ("F32", "F16", "BF16", "F64")
# Buffers of older checkpoints, which follow from config.json; transformers leaves them where they are too.
_UNNEEDED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "position_ids", "causal_mask")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: its file, and its name, dtype and shape there."""

    file: str
    name: str
    dtype: str
    shape: tuple[int, ...]


class HfWeights:
    """A `WeightSource` over a Hugging Face directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        directory = Path(path)
        if look(directory / "adapter_config.json") is not None:
            raise ConfigError(f"model {path} holds an adapter (adapter_config.json), which is not supported; merge it")
        arch = architecture_from_config(read_json(directory / "config.json"), f"model {path}")
        self._files: dict[str, Any] = {}  # opened safetensors by file
        self._where = _find_tensors(directory)
        if "lm_head.weight" in self._where:  # as transformers has it: not tied, if both are there and differ
            arch = replace(arch, tie_word_embeddings=False)
        _check_tensors(directory, arch, self._where)
        self.architecture = arch

    def read(self, name: str, part: Part = WHOLE) -> Tensor:
        file = self._where[name].file
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            stored = self._files[file].get_slice(self._where[name].name)
            rows, columns = (slice(*span) if span else slice(None) for span in (part.rows, part.columns))
            tensor: Tensor = stored[rows] if len(stored.get_shape()) == 1 else stored[rows, columns]
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"cannot read tensor {name} of {file}: {error}; fetch the model again") from None
        return tensor

    def rope_factors(self) -> Tensor | None:
        return None


def _find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor in the files, by its name without "model." in front. Raises ConfigError."""
    found: dict[str, StoredTensor] = {}
    for file in _shards(directory):
        for stored in read_safetensors_header(file):
            name = stored.name.removeprefix("model.")
            if name == "lm_head.weight":
                name = stored.name  # the head is no part of the inner model
            if name in found:
                first = f"{found[name].name} in {found[name].file}"
                raise ConfigError(f"model {directory} has {first} and {stored.name} in {file}; fetch it again")
            found[name] = stored
    return found


def _check_tensors(directory: Path, arch: Architecture, found: dict[str, StoredTensor]) -> None:
    """Raise ConfigError for a tensor that is missing, has another shape than promised, or is none of this model's."""
    expected = expected_tensors(arch)
    for name, shape in expected.items():
        stored = found.get(name)
        if stored is None:
            raise ConfigError(f"model {directory} has no tensor {name}; the download is incomplete, fetch it again")
        if stored.shape != shape:
            differs = f"tensor {name} has shape {stored.shape}, config.json promises {shape}"
            raise ConfigError(f"model {directory}: {differs}; the files are of different models, fetch it again")
        if stored.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise ConfigError(f"{stored.file}: tensor {stored.name} is {stored.dtype}; known: {known}")
    for name, stored in found.items():
        if name not in expected and not name.endswith(_UNNEEDED):
            model = f"a {arch.family} model of {arch.num_layers} layers as config.json describes it"
            raise ConfigError(
                f"model {directory}: tensor {stored.name} is none of {model}, and would be left out; "
                "use a model without it, or correct config.json"
            )


def _shards(directory: Path) -> list[str]:
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if look(single) is not None:
        return [str(single)]
    if look(index) is None:
        raise ConfigError(f"model {directory} has no model.safetensors (nor an index of shards); fetch its safetensors")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{index} has no weight_map; fetch the model again")
    return [str(directory / name) for name in sorted(set(map(str, weight_map.values())))]


def read_safetensors_header(file: str) -> list[StoredTensor]:
    """All tensors of a file, whose header the library checks against its size. Raises ConfigError."""
    file_size(file)  # a regular file, or what is said of it
    try:
        # The library takes a file that may not be read for none; and its numpy needs no torch.
        with open(file, "rb"), safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return [StoredTensor(file, name, one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()]
    except OSError as error:
        raise unreadable(file, error) from None
    except SafetensorError as error:
        reason = brief_error(error)
        raise ConfigError(
            f"{file} is truncated, damaged or not safetensors ({reason}); fetch the model again"
        ) from None
