"""Everything here needs a GPU and CUDA kernels, and is skipped with the reason where one is missing."""

from __future__ import annotations

import pytest
import torch

from tests.cuda_cases import Kernels


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    if not torch.cuda.is_available():
        pytest.skip("no GPU, or a CPU build of torch")
    compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    if not compiled.HAS_CUDA_KERNELS:
        pytest.skip("the extension was built without CUDA kernels (no nvcc)")
    return Kernels(torch.ops.ssd_runtime, torch.device("cuda", torch.cuda.current_device()))
