"""The header of a GGUF file: metadata and where each tensor lies. Knows no models.

Written out because reading a header with gguf.GGUFReader takes 5 to 10 seconds for a vocabulary of 50 to 150 thousand.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.files.fields import brief
from ssd_runtime.model.files.opening import file_size, unreadable

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LARGEST_COUNT = 1 << 32


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: outermost dimension first (the file stores it innermost first).
        offset: bytes from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """A parsed header over the mapped file.

    Attributes:
        metadata: key to value; arrays are lists (strings) or numpy arrays (numbers).
    """

    path: str
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data: np.ndarray

    def raw(self, name: str) -> np.ndarray:
        """The tensor's bytes, one row per row of its matrix; a view of the file."""
        tensor = self.tensors[name]
        rows = int(np.prod(tensor.shape[:-1], dtype=np.int64))
        return self.data[tensor.offset : tensor.offset + tensor.num_bytes].reshape(rows, -1)


def open_gguf(path: str) -> GgufFile:
    """Parse the header and check that every tensor lies inside the file.

    Raises:
        ConfigError: no such file, not GGUF, truncated or damaged.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise unreadable(path, error) from None
    if mapped[:4] != b"GGUF":
        raise ConfigError(f"model {path} is not a GGUF file; pass a GGUF file or a Hugging Face directory")
    try:
        metadata, tensors = _Header(mapped).parse()
    except (struct.error, IndexError, ValueError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise ConfigError(f"model {path} is truncated or damaged in its header ({error}); fetch it again") from None
    _refuse_a_part(path, metadata)
    for tensor in tensors.values():
        if tensor.offset + tensor.num_bytes > size:
            raise ConfigError(
                f"model {path} is truncated: tensor {tensor.name} ends at byte {tensor.offset + tensor.num_bytes}, "
                f"the file has {size}; fetch it again"
            )
    return GgufFile(path, metadata, tensors, np.frombuffer(mapped, np.uint8))


def _refuse_a_part(path: str, metadata: dict[str, Any]) -> None:
    count, number = metadata.get("split.count", 1), metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        raise ConfigError(f"model {path}: split.count or split.no is no number; fetch it again")
    if count > 1:
        part = f"part {number + 1} of {count} of a split GGUF file"
        raise ConfigError(f"model {path} is {part}; join them: llama-gguf-split --merge FIRST-PART WHOLE.gguf")


class _Header:
    """A cursor over the header."""

    def __init__(self, data: mmap.mmap | bytes) -> None:
        self.data, self.at = data, 4

    def parse(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, only 2 and 3 are known")
        num_tensors, num_keys = self.count(), self.count()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string()
            if key in metadata:
                raise ValueError(f"key {key!r} is there twice")
            metadata[key] = self.value(self.number("I"))
        entries = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {brief(alignment)}")
        start = -(-self.at // alignment) * alignment
        tensors = {e.name: GgufTensor(e.name, e.shape, e.kind, start + e.offset, e.num_bytes) for e in entries}
        if len(tensors) < len(entries):
            raise ValueError("a tensor is there twice")
        return metadata, tensors

    def number(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self) -> int:
        value = self.number("Q")
        if value > _LARGEST_COUNT:
            raise ValueError(f"a count of {value} near byte {self.at}")
        return int(value)

    def string(self) -> str:
        size = self.count()
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise ValueError("it ends inside a string")
        return self.data[start : self.at].decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"unknown value type {kind}")
        item, size = self.number("I"), self.count()
        if item == _STRING:
            return self.strings(size)
        if item not in _SCALARS:
            raise ValueError(f"an array of type {item}")  # ggml reads no arrays within arrays either
        dtype = np.dtype("<" + _SCALARS[item])
        values = np.frombuffer(self.data, dtype, size, self.at).copy()
        self.at += values.nbytes
        return values

    def strings(self, size: int) -> list[str]:
        data, at, unpack = self.data, self.at, struct.Struct("<Q").unpack_from  # locals: 300 thousand turns
        found = []
        for _ in range(size):
            (length,) = unpack(data, at)
            at += 8 + length
            if at > len(data):
                raise ValueError("it ends inside a list of strings")
            found.append(data[at - length : at].decode("utf-8", "replace"))
        self.at = at
        return found

    def tensor(self) -> GgufTensor:
        name, dims = self.string(), self.number("I")
        if dims > 4:
            raise ValueError(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(reversed([self.count() for _ in range(dims)]))
        kind = GGMLQuantizationType(self.number("I"))
        offset = self.number("Q")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        elements = int(np.prod(shape, dtype=object)) if shape else 1
        if not shape or shape[-1] % block:
            raise ValueError(f"tensor {name!r} of shape {shape} does not divide into blocks of {block}")
        return GgufTensor(name, shape, kind, offset, elements // block * block_bytes)
