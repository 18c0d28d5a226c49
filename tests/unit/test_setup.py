"""What setup.py builds, decided from torch, nvcc and the environment, and never from the presence of a GPU."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, on a machine with a compiler."""
    spec = importlib.util.spec_from_file_location("ssd_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ssd_setup", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in ("SSD_BUILD_EXT", "TORCH_CUDA_ARCH_LIST", "CXX"):
        monkeypatch.delenv(name, raising=False)
    return module


@pytest.mark.parametrize(
    ("torch_cuda", "cuda_home", "with_cuda", "reason"),
    [
        ("13.0", "/usr/local/cuda", True, "CUDA kernels for 8.0;9.0;10.0+PTX with /usr/local/cuda"),
        ("13.0", None, False, "no nvcc in CUDA_HOME or PATH"),
        (None, "/usr/local/cuda", False, "torch is a CPU build"),
        (None, None, False, "torch is a CPU build"),
    ],
)
def test_cuda_kernels_need_a_cuda_torch_and_nvcc(build, torch_cuda, cuda_home, with_cuda, reason):
    chosen = build.plan(torch_cuda, cuda_home, None)
    assert chosen.with_cuda == with_cuda
    assert reason in chosen.reason


def test_architectures_come_from_the_environment_or_are_the_default(build):
    assert build.plan("13.0", "/cuda", "7.5;9.0a").architectures == "7.5;9.0a"
    for unset in (None, ""):
        assert build.plan("13.0", "/cuda", unset).architectures == "8.0;9.0;10.0+PTX"


def test_every_source_is_compiled_once_and_the_cuda_ones_only_on_demand(build):
    cpu, cuda = build.sources(False), build.sources(True)
    assert cuda[: len(cpu)] == cpu
    assert cuda[len(cpu) :] == ["cuda_ext/csrc/cuda/operators.cpp", "cuda_ext/csrc/cuda/launch.cu"]
    assert sorted(cpu) == sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "cuda_ext/csrc").glob("*.cpp"))


@pytest.mark.parametrize("nvcc", [True, False])
def test_no_gpu_is_asked_for(build, nvcc, monkeypatch):
    """With a CUDA torch on a machine without a GPU, CUDA kernels are built where there is nvcc."""

    def no_gpu(*_: object) -> bool:
        raise AssertionError("building must not depend on a GPU")

    made: list[SimpleNamespace] = []
    for kind in ("CppExtension", "CUDAExtension"):
        make = lambda name, sources, kind=kind, **arguments: made.append(  # noqa: E731
            SimpleNamespace(kind=kind, name=name, sources=sources, **arguments)
        )
        monkeypatch.setattr(cpp_extension, kind, make)
    monkeypatch.setattr(torch.cuda, "is_available", no_gpu)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/usr/local/cuda" if nvcc else None)
    build.extension_arguments()
    (extension,) = made
    assert extension.kind == ("CUDAExtension" if nvcc else "CppExtension")
    assert ("cuda_ext/csrc/cuda/launch.cu" in extension.sources) == nvcc
    assert build.os.environ.get("TORCH_CUDA_ARCH_LIST") == ("8.0;9.0;10.0+PTX" if nvcc else None)
    assert extension.py_limited_api
    for flags in extension.extra_compile_args.values():
        assert "-DTORCH_TARGET_VERSION=0x020a000000000000" in flags
    assert "--fmad=false" in extension.extra_compile_args["nvcc"]


def test_the_check_of_the_kernels_compiles_for_what_is_built(build):
    check = (ROOT / "ops" / "cuda_check.py").read_text()
    assert f'DEFAULT_ARCHITECTURES = "{build.DEFAULT_ARCHITECTURES}"' in check


def test_the_extension_can_be_left_out(build, monkeypatch, capsys):
    monkeypatch.setenv("SSD_BUILD_EXT", "0")
    assert build.extension_arguments() == {}
    monkeypatch.delenv("SSD_BUILD_EXT")
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.extension_arguments() == {}
    assert "no C++ compiler 'no-such-compiler'" in capsys.readouterr().out
