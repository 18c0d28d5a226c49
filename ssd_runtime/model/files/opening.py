"""Opening the files of a model. Knows no formats but JSON.

Model files are data of strangers: only regular files are opened, the small ones are bounded in size and depth, and what
cannot be read is said with the remedy that fits.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from ssd_runtime.errors import ConfigError

_LARGEST_TEXT = 64 << 20  # bytes; the index of a model of a thousand shards has one or two million


def look(path: str | Path) -> os.stat_result | None:
    """What lies at the path, None for nothing. Raises ConfigError when that may not be asked."""
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a path with a null byte
        return None
    except OSError as error:
        raise unreadable(path, error) from None


def file_size(path: str | Path) -> int:
    """Bytes of a regular file. Raises ConfigError for anything else: opening a pipe or a device may never return."""
    found = look(path)
    if found is None:
        raise ConfigError(f"{path} is missing; the download is incomplete, fetch the model again")
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is no regular file; put the model's own file there")
    return found.st_size


def read_text(path: Path) -> str:
    """A small file of a model directory. Raises ConfigError when it is missing, too large or no text."""
    size = file_size(path)
    if size > _LARGEST_TEXT:
        raise ConfigError(f"{path} has {size} bytes, at most {_LARGEST_TEXT} are read; fetch the model again")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise unreadable(path, error) from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason}); fetch the model again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model directory; raises ConfigError when it is missing or damaged."""
    try:
        value = json.loads(read_text(path))
    except RecursionError:
        raise ConfigError(f"{path} is nested too deeply; fetch the model again") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path} does not hold a JSON object; fetch the model again")
    return value


def unreadable(path: str | Path, error: OSError) -> ConfigError:
    """The error to raise for one of the system's."""
    remedy = "give this user the right to read it" if isinstance(error, PermissionError) else "check the path and disk"
    return ConfigError(f"cannot read {path}: {error.strerror or error}; {remedy}")
