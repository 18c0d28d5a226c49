"""Freed memory goes back to the system although blocks that stay lie between."""

from __future__ import annotations

import ctypes

import psutil
import pytest

from ssd_runtime.comm.control.server import give_back

COUNT, SIZE = 100_000, 500


def resident_mib() -> float:
    return float(psutil.Process().memory_info().rss) / 2**20


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="a libc without malloc_trim")
def test_what_is_freed_between_blocks_that_stay_is_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    blocks = [ctypes.c_void_p(libc.malloc(SIZE)) for _ in range(COUNT)]
    stay = blocks[::200]
    for block in blocks:
        ctypes.memset(block, 1, SIZE)
    for index, block in enumerate(blocks):
        if index % 200:
            libc.free(block)
    freed = resident_mib()
    give_back()
    assert resident_mib() < freed - 20.0
    for block in stay:
        libc.free(block)
