"""Every operator in plain torch: the oracle of the compiled kernels, and what runs where they are not built.

Knows no models and no caches.
"""

from cuda_ext.reference.attention import paged_attention
from cuda_ext.reference.cache import copy_branch_, match_outcomes, new_cache, raise_faults, rollback_, write_kv_
from cuda_ext.reference.layers import add_rms_norm, rms_norm, rope_write_, silu_mul
from cuda_ext.reference.linear import (
    linear_bf16,
    linear_fp32,
    linear_grouped,
    linear_int8,
    pack_bf16,
    pack_fp32,
    pack_grouped,
    pack_int8,
)
from cuda_ext.reference.sampling import sample_shared_noise

__all__ = [
    "add_rms_norm",
    "copy_branch_",
    "linear_bf16",
    "linear_fp32",
    "linear_grouped",
    "linear_int8",
    "match_outcomes",
    "new_cache",
    "pack_bf16",
    "pack_fp32",
    "pack_grouped",
    "pack_int8",
    "paged_attention",
    "raise_faults",
    "rms_norm",
    "rollback_",
    "rope_write_",
    "sample_shared_noise",
    "silu_mul",
    "write_kv_",
]
