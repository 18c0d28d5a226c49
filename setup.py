"""Builds `cuda_ext._C`, the compiled operators, where there is a C++ compiler; without, the runtime uses plain torch.

Everything else about the package is in pyproject.toml. SSD_BUILD_EXT=0 leaves the extension out.
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
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        print(f"cuda_ext: not built ({error}; pip install with --no-build-isolation); the runtime will use plain torch")
        return {}
    compiler = os.environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        print(f"cuda_ext: not built (no C++ compiler {compiler!r}); the runtime will use plain torch")
        return {}
    extension = CppExtension(
        "cuda_ext._C",
        sorted(str(path) for path in Path("cuda_ext/csrc").glob("*.cpp")),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++17",
            "-ffp-contract=off",
            "-fvisibility=hidden",
            "-Wall",
            "-Wno-psabi",
            "-Wno-unknown-pragmas",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10
        ],
        py_limited_api=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(**extension_arguments())
