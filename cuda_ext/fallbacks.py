"""What serves an operator where the compiled library holds no kernel of it: plain torch for CUDA tensors, and for meta
tensors, with which a forward is followed without its numbers and tracing learns shapes and dtypes."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from cuda_ext import reference
from cuda_ext.reference.layers import rotate_

# The forward operators have CPU kernels only; the others have CUDA kernels where the library was built with nvcc.
NAMES = (
    "rms_norm",
    "add_rms_norm",
    "silu_mul",
    "rope_write_",
    "copy_branch_",
    "write_kv_",
    "rollback_",
    "match_outcomes",
    "sample_shared_noise",
    "raise_faults",
)


def rope_write_(
    q_NHD: Tensor, k_NGD: Tensor, v_NGD: Tensor, cos_ND: Tensor, sin_ND: Tensor, kv_2SGD: Tensor, slots_N: Tensor
) -> None:
    """The rotation in plain torch, the scatter by `write_kv_`, which has a CUDA kernel where the library has any."""
    rotate_(q_NHD, k_NGD, cos_ND, sin_ND)
    torch.ops.ssd_runtime.write_kv_(kv_2SGD, k_NGD, v_NGD, slots_N)


def has_kernel(name: str, key: str = "CUDA") -> bool:
    """Whether anything serves such tensors: the library, or what `register` has added."""
    served: bool = torch._C._dispatch_has_kernel_for_dispatch_key(f"ssd_runtime::{name}", key)
    return served


def register() -> torch.library.Library:
    """Register them; they last as long as the result is held."""
    library = torch.library.Library("ssd_runtime", "IMPL")
    for name in ("copy_branch_", "write_kv_", "rollback_"):
        library.impl(name, _changes_nothing, "Meta")
    for name, key in itertools.product(NAMES, ("CUDA", "Meta")):
        if not has_kernel(name, key):
            library.impl(name, rope_write_ if name == "rope_write_" else getattr(reference, name), key)
    return library


def _changes_nothing(*_: object) -> None:
    """On meta tensors, an operator that changes its arguments and returns nothing."""
