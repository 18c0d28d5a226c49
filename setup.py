"""Builds `cuda_ext._C`, the compiled operators, where there is a C++ compiler; without, the runtime uses plain torch.

CUDA kernels come with it where nvcc is found (CUDA_HOME, or PATH) and torch is a CUDA build; no GPU is needed. They are
built for TORCH_CUDA_ARCH_LIST, by default sm_80, sm_90, sm_100 and PTX. `make cuda-check` compiles them beside any
torch. Everything else about the package is in pyproject.toml. SSD_BUILD_EXT=0 leaves the extension out.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup

SOURCES = Path(__file__).resolve().parent / "cuda_ext" / "csrc"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # of torch 2.10
CXX_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-unknown-pragmas",
]
NVCC_FLAGS = ["-O3", "-std=c++17", "--fmad=false"]


@dataclass(frozen=True)
class Plan:
    """What is built: with CUDA kernels or not, for which architectures, and a line that says why."""

    with_cuda: bool
    architectures: str
    reason: str


def plan(torch_cuda: str | None, cuda_home: str | None, architectures: str | None) -> Plan:
    """Decide from what can be built here, never from whether a GPU is present.

    Args:
        torch_cuda: `torch.version.cuda`; None for a CPU build, against which CUDA kernels cannot be linked.
        cuda_home: where torch's build tools find nvcc (CUDA_HOME, PATH); None where they do not.
        architectures: TORCH_CUDA_ARCH_LIST; unset or empty means the default.
    """
    chosen = architectures or DEFAULT_ARCHITECTURES
    if torch_cuda is None:
        return Plan(False, chosen, "CPU kernels only (torch is a CPU build; `make cuda-check` compiles the others)")
    if cuda_home is None:
        return Plan(False, chosen, "CPU kernels only (no nvcc in CUDA_HOME or PATH)")
    return Plan(True, chosen, f"CPU kernels, and CUDA kernels for {chosen} with {cuda_home}")


def sources(with_cuda: bool) -> list[str]:
    """What is compiled, relative to the project; the .cu of the launches includes the kernels (.cuh)."""
    files = sorted(SOURCES.glob("*.cpp"))
    if with_cuda:
        files += sorted(SOURCES.glob("cuda/*.cpp")) + sorted(SOURCES.glob("cuda/*.cu"))
    return [path.relative_to(SOURCES.parent.parent).as_posix() for path in files]


def extension_arguments() -> dict[str, object]:
    """Keyword arguments of setup() for the extension, or none and one line that says why."""
    asked = os.environ.get("SSD_BUILD_EXT", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"SSD_BUILD_EXT={asked!r} means nothing; use 0 or 1, or unset it")
    if asked == "0":
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
    chosen = plan(torch.version.cuda, CUDA_HOME, os.environ.get("TORCH_CUDA_ARCH_LIST"))
    print(f"cuda_ext: {chosen.reason}")
    if chosen.with_cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = chosen.architectures
    extension = (CUDAExtension if chosen.with_cuda else CppExtension)(
        "cuda_ext._C",
        sources(chosen.with_cuda),
        extra_compile_args={"cxx": [*CXX_FLAGS, STABLE_ABI], "nvcc": [*NVCC_FLAGS, STABLE_ABI]},
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


if __name__ == "__main__":
    setup(**extension_arguments())
