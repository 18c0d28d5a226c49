"""The CUDA kernels on the host: compiled by g++ with a launcher that stands in for a device."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from setup import STABLE_ABI

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "cuda_ext" / "csrc"


def build(directory: Path) -> Path:
    """Compile the emulated operators; SSD_SANITIZE=1 in the environment adds AddressSanitizer and UBSan."""
    compiler = shutil.which(os.environ.get("CXX", "c++").split()[0])
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = directory / "emulated.so"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"]
    command = [
        *(compiler, "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Werror", "-ffp-contract=off"),
        *(sanitize if os.environ.get("SSD_SANITIZE") == "1" else []),
        STABLE_ABI,
        *(f"-I{path}" for path in (SOURCES, HERE)),
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        *(str(HERE / "emulated.cpp"), "-o", str(library)),
        *(f"-L{path}" for path in cpp_extension.library_paths()),
        *("-ltorch", "-ltorch_cpu", "-lc10"),
    ]
    subprocess.run(command, check=True, timeout=170)
    torch.ops.load_library(str(library))
    return library
