"""Prompt sets: JSON lines of id, set and prompt. Knows no models."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import msgspec
from msgspec import Struct

from ssd_runtime.errors import ConfigError
from ssd_runtime.reading import read_text

MOST_BYTES = 1 << 26  # of a file


@dataclass(frozen=True)
class Prompt:
    """One prompt of a benchmark.

    Attributes:
        id: unique in its set.
        set: the kind of prompt, to report by.
        prompt: what the user says; the chat template is put around it.
    """

    id: str
    set: str
    prompt: str


def read_prompts(path: str | Path | None = None, limit: int | None = None) -> list[Prompt]:
    """Read a prompt file, or the embedded set when `path` is None; the first `limit` of it.

    Raises:
        ConfigError: unreadable, empty, or a line that is not what a prompt is; names the line.
    """
    name = "the embedded prompt set" if path is None else str(path)
    if path is None:
        text = resources.files("launcher.bench").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    else:
        text = read_text(path, "prompts", MOST_BYTES)
    lines = enumerate(text.split("\n"), 1)
    prompts = [_parse(line, number, name) for number, line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompts {name}: there is no prompt in it")
    return prompts[:limit]


class _Line(Struct):
    prompt: str
    id: str | int | None = None
    set: str | int = ""


def _parse(line: str, number: int, name: str) -> Prompt:
    where = f"prompts {name}, line {number}"
    try:
        entry = msgspec.json.decode(line, type=_Line)
    except msgspec.ValidationError as error:
        raise ConfigError(f'{where}: expected {{"id": ..., "set": ..., "prompt": "some text"}} ({error})') from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ConfigError(f"{where}: not JSON ({error})") from None
    if not entry.prompt.strip():
        raise ConfigError(f"{where}: the prompt is empty")
    return Prompt(str(number if entry.id is None else entry.id), str(entry.set), entry.prompt)
