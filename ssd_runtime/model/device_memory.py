"""The memory of a GPU as torch sees it, and what is said where there is no more of it. Knows no models.

The only two questions asked of a device about its memory; tests put others in their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ssd_runtime.errors import ConfigError
from ssd_runtime.model.memory import GIB

_WORDS = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def free_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU. What torch keeps of tensors that are gone is given back first: it counts as free."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


@contextlib.contextmanager
def enough_for(doing: str, who: str, device: torch.device, needs: Callable[[], str], remedy: str) -> Iterator[None]:
    """Where the memory of `device` runs out inside, one line says who took it for what, and what to change.

    Args:
        needs: how much of it, asked only then.

    Raises:
        ConfigError: it ran out.
    """
    free = None if device.type == "cpu" else free_and_total(device)[0]
    try:
        yield
    except RuntimeError as error:
        if not ran_out(error):
            raise
        had = "" if free is None else f", {free / GIB:.1f} GiB free"
        line = f"{who} ran out of memory on {device} while {doing}: {needs()}{had}; {remedy}"
        raise ConfigError(line) from error


def ran_out(error: Exception) -> bool:
    """Whether a device had no memory left: said by torch, by CUDA itself where a kernel is loaded, or by cuBLAS."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)


def told(error: Exception) -> str:
    """What went wrong in a forward, in one line; where the device had no memory left, what to change."""
    if ran_out(error):
        return "out of device memory; lower engine.kv_memory or engine.prefill_chunk"
    return f"{type(error).__name__}: {error}".splitlines()[0]
