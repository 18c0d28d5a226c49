"""Builds `cuda_ext._C`, the compiled operators, where there is a C++ compiler; without, the runtime uses plain torch.

CUDA kernels come with it where nvcc is found (CUDA_HOME, or PATH) and torch is a CUDA build; no GPU is needed. They are
built for TORCH_CUDA_ARCH_LIST, by default sm_80, sm_90, sm_100 and PTX. `make cuda-check` compiles them beside any
torch. Everything else about the package is in pyproject.toml. SSD_BUILD_EXT=0 leaves the extension out.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup


def extension_arguments() -> dict[str, object]:
    """Keyword arguments of setup() for the extension, or none and one line that says why."""
    if os.environ.get("SSD_BUILD_EXT") == "0":
        print("cuda_ext: not built (SSD_BUILD_EXT=0); the runtime will use plain torch")
        return {}
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        print(f"cuda_ext: not built ({error}; pip install with --no-build-isolation); the runtime will use plain torch")
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"cuda_ext: not built (no C++ compiler {compiler!r}); the runtime will use plain torch")
        return {}
    sources = sorted(str(path) for path in Path("cuda_ext/csrc").glob("*.cpp"))
    stable_abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of torch 2.10
    flags = {
        "cxx": [
            "-O3",
            "-g0",
            "-std=c++17",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
            stable_abi,
        ],
        "nvcc": ["-O3", "-std=c++17", "--fmad=false", stable_abi],
    }
    make = CppExtension
    if torch.version.cuda is None:
        print("cuda_ext: CPU kernels only (torch is a CPU build; `make cuda-check` compiles the others)")
    elif CUDA_HOME is None:
        print("cuda_ext: CPU kernels only (no nvcc in CUDA_HOME or PATH)")
    else:
        make = CUDAExtension
        sources += sorted(str(path) for path in Path("cuda_ext/csrc/cuda").glob("*.c*") if path.suffix != ".cuh")
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX")
    extension = make("cuda_ext._C", sources, extra_compile_args=flags, py_limited_api=True)
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension_arguments())
