"""The operators the runtime calls: the compiled extension where it is built, else plain torch.

`ops.rms_norm` and the like are picked at their first use, for good; `cuda_ext/reference/` says what each takes and
gives. `SSD_CUDA_EXT=0` in the environment asks for plain torch.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cuda_ext import reference
from cuda_ext.reference.attention import Span as Span
from cuda_ext.reference.weights import DecoderWeights as DecoderWeights

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from cuda_ext.compiled import decoder_layers_ as decoder_layers_
    from cuda_ext.reference import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """An operator that was not called yet: kept here, so that the next call finds it at once."""
        if name.startswith("_"):
            raise AttributeError(f"module {__name__} has no {name}")
        found = globals()[name] = getattr(_kernels(), name)
        return found


@functools.cache
def _kernels() -> ModuleType:
    if os.environ.get("SSD_CUDA_EXT") == "0":
        return reference
    try:
        return importlib.import_module("cuda_ext.compiled")
    except (ImportError, OSError) as error:  # not built, or built for a torch it cannot be loaded into
        log.warning("compiled operators not available (%s); using plain torch, which is slower", error)
        return reference


def backend() -> Literal["compiled", "plain"]:
    """Which implementation this process uses; raises ValueError for kernels asked for that do not run here."""
    return "plain" if _kernels() is reference else "compiled"


def compiled_for(device: torch.device) -> bool:
    """Whether compiled kernels serve the operators on the cache and on tokens on this kind of device."""
    if backend() == "plain":
        return False
    return device.type == "cpu" or (device.type == "cuda" and bool(_kernels().HAS_CUDA_KERNELS))


def about() -> str:
    """One line for people: which implementation, its level on this CPU, and whether it holds CUDA kernels."""
    if backend() == "compiled":
        cuda = "built in" if _kernels().HAS_CUDA_KERNELS else "not built in (plain torch serves CUDA tensors)"
        return f"compiled extension: CPU kernels {_kernels().cpu_level()}, CUDA kernels {cuda}"
    if os.environ.get("SSD_CUDA_EXT") == "0":
        return "plain torch, which is slower (SSD_CUDA_EXT=0 asks for it)"
    return "plain torch, which is slower (`make ext` builds the extension)"


def uploaded(values: Sequence[int], device: torch.device) -> Tensor:
    """A new int64 vector on the device, in a copy that the host does not wait for."""
    return _on_host(values, device).to(device, non_blocking=True)


def upload_(target: Tensor, values: Sequence[int]) -> None:
    """Write them into an int64 vector of the same length; the host does not wait either."""
    target.copy_(_on_host(values, target.device), non_blocking=True)


def _on_host(values: Sequence[int], device: torch.device) -> Tensor:
    """Pinned for a GPU: from memory that may be paged out the copy waits, and torch keeps pinned memory until then."""
    return torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")


def to_host(*results: Tensor) -> tuple[Tensor, ...]:
    """The same tensors on the CPU, by one copy; on the CPU themselves. They may differ in shape and dtype.

    Together, since each read of its own waits for all that is queued on the device.
    """
    if results[0].device.type == "cpu":
        return results
    widest_first = sorted(results, key=lambda result: -result.itemsize)  # so each begins where its dtype may
    parts = [result.flatten().contiguous().view(torch.uint8) for result in widest_first]
    copied = torch.cat(parts).cpu().split([part.numel() for part in parts])
    found = {
        id(result): flat.view(result.dtype).view(result.shape)
        for result, flat in zip(widest_first, copied, strict=True)
    }
    return tuple(found[id(result)] for result in results)
