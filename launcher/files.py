"""Files that the user wants written: whether that can be done, and what is said where it cannot."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ssd_runtime.errors import ConfigError, InputOutputError


def check_writable(path: Path | None) -> None:
    """Raise ConfigError unless the file that an option names can be written; without a path, nothing."""
    if path is not None and not path.exists():
        check_replaceable(path)
    elif path is not None and not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write {path}: it may not be written to")


def check_replaceable(path: Path | None) -> None:
    """The same for a file that is replaced by a new one when that is complete: a device or a pipe cannot be."""
    if path is not None and path.exists() and not path.is_file():
        raise ConfigError(f"cannot write {path}: it is no ordinary file")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: {path.parent} is not a directory one may write to")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file of the user's could not be written, as InputOutputError."""
    try:
        yield
    except OSError as error:
        raise InputOutputError(f"cannot write {path}: {error.strerror or error}") from None
