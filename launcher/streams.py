"""The standard streams of a command: fit for any text, and with a name where they fail. Knows no commands."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

from ssd_runtime.errors import InputOutputError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Writer(io.FileIO):
    """A stream of the process whose OSErrors say which it is. What is written after the first goes nowhere, so that the
    flush at exit has nothing to add."""

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self._called = name

    def write(self, data: ReadableBuffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            raise OSError(error.errno, error.strerror, self._called) from None


def prepare() -> None:
    """Make standard output and standard error what this file promises.

    Raises:
        InputOutputError: there is no standard output, so nobody would get the answer.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:  # else the next file or socket to be opened would be written to as standard output
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number is taken first
    if 1 in closed:
        raise InputOutputError("standard output is closed: give it a file, a pipe or /dev/null")
    if sys.stdout is sys.__stdout__ is not None:
        sys.stdout = _named(sys.__stdout__, "standard output")
    if sys.stderr is sys.__stderr__ is not None:
        sys.stderr = _named(sys.__stderr__, "standard error")


def _named(stream: TextIO, name: str) -> TextIO:
    """The same stream, with a name; a terminal that is not UTF-8 shows what it can and the rest as escapes."""
    return io.TextIOWrapper(
        io.BufferedWriter(_Writer(stream.fileno(), name)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.isatty() or name == "standard error",
    )


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
