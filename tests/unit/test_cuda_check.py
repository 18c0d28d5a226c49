"""The check of the CUDA kernels reads ptxas right and knows when to complain."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "ops" / "cuda_check.py"


@pytest.fixture(scope="module")
def cuda_check():
    spec = importlib.util.spec_from_file_location("cuda_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["cuda_check"]


REPORT = """\
ptxas info    : 4 bytes gmem
ptxas info    : Compiling entry function '_ZN3ssd15write_kv_kernelImEEvNS_9WriteArgsEl' for 'sm_80'
ptxas info    : Function properties for _ZN3ssd15write_kv_kernelImEEvNS_9WriteArgsEl
    0 bytes stack frame, {spill} bytes spill stores, 0 bytes spill loads
ptxas info    : Used {registers} registers, used 0 barriers, {shared} bytes smem, 488 bytes cmem[0]
"""


@pytest.mark.parametrize(
    ("spill", "registers", "shared", "complaint"),
    [
        (0, 24, 0, None),
        (4, 24, 0, "write_kv_kernel spills 4 bytes"),
        (0, 41, 0, "write_kv_kernel uses 41 registers, its budget is 40"),
        (0, 24, 16, "write_kv_kernel uses 16 bytes of shared memory, its budget is 0"),
    ],
)
def test_spills_and_budgets(cuda_check, spill, registers, shared, complaint):
    (usage,) = cuda_check.parse(REPORT.format(spill=spill, registers=registers, shared=shared))
    assert (usage.architecture, usage.registers) == ("sm_80", registers)
    assert usage.complaint() == complaint


def test_a_kernel_without_a_budget_is_a_complaint(cuda_check):
    report = REPORT.replace("15write_kv_kernel", "10new_kernel").format(spill=0, registers=1, shared=0)
    (usage,) = cuda_check.parse(report)
    assert "has no budget" in usage.complaint()


def test_architectures_are_read_as_torch_reads_them(cuda_check):
    assert cuda_check.gencodes("8.0;9.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]
    with pytest.raises(ValueError, match="cannot read 'Ampere'"):
        cuda_check.gencodes("Ampere")
