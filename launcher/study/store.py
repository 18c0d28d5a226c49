"""What was recorded, in a file: redrawing a figure needs no models. Knows no models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy
import torch
from msgspec import Struct
from torch import Tensor

from launcher.study.recording import Record
from ssd_runtime.errors import ConfigError


class Source(Struct, frozen=True):
    """What records were made with."""

    target: str
    draft: str
    prompts: list[str]
    temperatures: list[float]
    max_tokens: int
    lookahead: int
    budget: int
    saguaro: list[float]


class Recording(Struct, frozen=True, tag_field="format", tag=2):
    """The whole file."""

    about: Source
    records: list[Record]


def save(path: Path, recording: Recording) -> None:
    """Write records, and what they were recorded with."""
    path.write_bytes(msgspec.msgpack.encode(recording, enc_hook=Tensor.tolist))


def load(path: Path, about: Source) -> list[Record]:
    """Read records.

    Raises:
        ConfigError: unreadable, or recorded with something else than `about`; names what differs.
    """
    try:
        found = msgspec.msgpack.decode(path.read_bytes(), type=Recording, dec_hook=_tensor)
    except OSError as error:
        raise ConfigError(f"cannot read recording {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(
            f"recording {path} is damaged or of another version ({error}); remove it to record anew"
        ) from None
    for name in Source.__struct_fields__:
        known, asked = getattr(found.about, name), getattr(about, name)
        if known != asked:
            remedy = "give it another name, or remove it to record anew"
            raise ConfigError(f"recording {path} was made with {name} = {known}, not {asked}; {remedy}")
    return found.records


def _tensor(kind: type, values: list[Any]) -> Tensor:
    """int64 or float64, as they were."""
    return torch.from_numpy(numpy.array(values))
