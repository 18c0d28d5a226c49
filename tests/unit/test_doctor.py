"""What `ssd doctor` says about the operators in use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cuda_ext import ops, reference
from launcher import doctor
from ssd_runtime.config import Config


def operators() -> doctor.Finding:
    (finding,) = (found for found in doctor.examine(Config()) if found.subject == "operators")
    return finding


@pytest.mark.parametrize(
    ("has_cuda_kernels", "says"),
    [(True, "CUDA kernels built in"), (False, "CUDA kernels not built in (plain torch serves CUDA tensors)")],
)
def test_it_names_the_cpu_level_and_whether_there_are_cuda_kernels(monkeypatch, has_cuda_kernels, says):
    kernels = SimpleNamespace(HAS_CUDA_KERNELS=has_cuda_kernels, cpu_level=lambda: "avx2")
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    assert operators() == doctor.Finding("operators", True, f"compiled extension: CPU kernels avx2, {says}")


def test_it_tells_plain_torch_that_was_asked_for_from_an_extension_that_is_missing(monkeypatch):
    monkeypatch.setattr(ops, "_kernels", lambda: reference)
    monkeypatch.setenv("SSD_CUDA_EXT", "0")
    assert operators().detail == "plain torch, which is slower (SSD_CUDA_EXT=0 asks for it)"
    monkeypatch.delenv("SSD_CUDA_EXT")
    assert operators().detail == "plain torch, which is slower (`make ext` builds the extension)"
