"""Prompt sets: JSON lines of id, set and prompt. Knows no models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

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


def _parse(line: str, number: int, name: str) -> Prompt:
    where = f"prompts {name}, line {number}"
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError):  # an integer of thousands of digits; nested beyond what Python follows
        raise ConfigError(f"{where}: a number too long, or nested too deeply") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"].strip():
        raise ConfigError(f'{where}: expected {{"id": ..., "set": ..., "prompt": "some text"}}')
    names = entry.get("id", number), entry.get("set", "")
    if not all(isinstance(one, str | int) for one in names):
        raise ConfigError(f"{where}: id and set must be text or a number")
    try:
        entry["prompt"].encode("utf-8")
    except UnicodeEncodeError:
        raise ConfigError(f"{where}: the prompt has half of a surrogate pair, which is no text") from None
    return Prompt(str(names[0]), str(names[1]), entry["prompt"])
