"""The operators the runtime calls: the compiled extension where it is built, else plain torch.

`ops.rms_norm` and the like are picked at their first use, for good; `cuda_ext/reference/` says what each takes and
gives. `SSD_CUDA_EXT=0` in the environment asks for plain torch.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import torch

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
