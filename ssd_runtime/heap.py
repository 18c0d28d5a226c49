"""The process's heap: what was freed goes back to the system. Knows nothing of what was in it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of memory that the process takes now. Raises OSError if no descriptor is left to look with."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * PAGE


def give_back() -> None:
    """Return freed memory to the system.

    What piles up in a burst is freed in the order of its reading, between blocks that stay, and malloc by itself gives
    back only what is free at the top: after each burst the process may be a little larger. Under a millisecond after a
    burst of tens of MiB. Without glibc (malloc_trim(3)) nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
