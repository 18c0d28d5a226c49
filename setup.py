"""Builds `cuda_ext._C`, the compiled operators, where there is a C++ compiler; without, the runtime uses plain torch.

CUDA kernels come with it where nvcc is found (CUDA_HOME, or PATH) and torch is a CUDA build; no GPU is needed. They are
built for TORCH_CUDA_ARCH_LIST, by default sm_80, sm_90, sm_100 and PTX. `make cuda-check` compiles them beside any
torch. Everything else about the package is in pyproject.toml, also the oldest torch, whose stable ABI is built for.
SSD_BUILD_EXT=0 leaves the extension out.
"""

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import setuptools

ROOT = Path(__file__).resolve().parent
SOURCES = ROOT / "cuda_ext" / "csrc"
DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    major, minor, *_ = (int(number) for number in re.findall(r"\d+", f"{version}.0"))
    return major, minor


def oldest(package: str) -> tuple[int, int]:
    """The oldest release of a package that pyproject.toml takes, to build with or to run with."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    demands = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    return next(release(demand) for demand in demands if demand.startswith(f"{package}>="))


def refuse_older(package: str, version: str) -> None:
    """End with one line where a package is older than pyproject.toml takes: a build without isolation asks nobody."""
    if release(version) < oldest(package):
        wanted = ".".join(map(str, oldest(package)))
        raise SystemExit(f"{package} {version} is older than {wanted}; pip install '{package}>={wanted}'")


STABLE_ABI = "-DTORCH_TARGET_VERSION=0x{:02x}{:02x}000000000000".format(*oldest("torch"))
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


def toolkit(nvcc: str) -> str | None:
    """Where nvcc says that its toolkit is, if it does; what is in PATH may be a script, or a link, from elsewhere."""
    command = [nvcc, "--dryrun", "-E", "-x", "cu", os.devnull]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return os.path.realpath(found[1]) if found else None


def extension_arguments() -> dict[str, object]:
    """Keyword arguments of setup() for the extension, or none and one line that says why."""
    asked = os.environ.get("SSD_BUILD_EXT", "")
    if asked not in ("", "0", "1"):
        raise SystemExit(f"SSD_BUILD_EXT={asked!r} means nothing; use 0 or 1, or unset it")
    if asked == "0":
        print("cuda_ext: not built (SSD_BUILD_EXT=0); the runtime will use plain torch")
        return {}
    nvcc = shutil.which("nvcc")
    if nvcc and not {"CUDA_HOME", "CUDA_PATH"} & os.environ.keys() and (home := toolkit(nvcc)):
        os.environ["CUDA_HOME"] = home  # torch's build tools read it when imported
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        print(f"cuda_ext: not built ({error}; pip install with --no-build-isolation); the runtime will use plain torch")
        return {}
    refuse_older("torch", torch.__version__)
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
    refuse_older("setuptools", setuptools.__version__)
    setuptools.setup(**extension_arguments())
