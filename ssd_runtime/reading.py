"""Text of strangers, read whole: a bounded number of bytes, from whatever the path names, within a bounded silence.

Knows no formats. A pipe, a terminal or a device gives its bytes once; whoever needs them twice keeps them.
"""

from __future__ import annotations

import os
import select
from pathlib import Path

from ssd_runtime.errors import ConfigError

SILENCE_S = 10.0  # longest wait for whoever writes into a pipe
_PIECE = 1 << 16


def read_text(path: str | Path, what: str, most: int) -> str:
    """The text of a file, pipe or device.

    Args:
        what: what it is, to begin an error with.
        most: bytes it may have.

    Raises:
        ConfigError: it cannot be read, is larger, is not UTF-8, or nothing comes for `SILENCE_S`.
    """
    try:
        # A named pipe that nobody writes to would keep an ordinary open() waiting.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = _read(descriptor, most + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None
    return decode(data, f"{what} {path}", most)


def decode(data: bytes, name: str, most: int) -> str:
    """Bytes as text; raises ConfigError, which begins with `name`, for more than `most` and for what is not UTF-8."""
    if len(data) > most:
        raise ConfigError(f"{name} has more than {most} bytes, the most there may be")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def _read(descriptor: int, count: int) -> bytes:
    """Up to `count` bytes, fewer at the end of the file."""
    pieces, left = [], count
    while left > 0:
        _await(descriptor)
        piece = os.read(descriptor, min(left, _PIECE))
        if not piece:
            break
        pieces.append(piece)
        left -= len(piece)
    return b"".join(pieces)


def _await(descriptor: int) -> None:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    if not poll.poll(SILENCE_S * 1000):
        raise TimeoutError(0, f"nothing came within {SILENCE_S:g} s")
