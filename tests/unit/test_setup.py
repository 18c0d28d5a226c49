"""What setup.py builds, decided from torch, nvcc and the environment, and never from the presence of a GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils import cpp_extension

from launcher import doctor
from ops import host_check

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
    monkeypatch.setattr(module.shutil, "which", lambda name: f"/nowhere/{name}")
    for name in ("SSD_BUILD_EXT", "TORCH_CUDA_ARCH_LIST", "CXX", "CUDA_HOME", "CUDA_PATH"):
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
        assert build.STABLE_ABI in flags
    assert "--fmad=false" in extension.extra_compile_args["nvcc"]


def test_the_oldest_torch_is_one_number(build):
    """Of pyproject.toml, what is built for, what `ssd doctor` refuses, and what the README says."""
    assert build.oldest("torch") == doctor.OLDEST_TORCH == (2, 10)
    assert build.STABLE_ABI == "-DTORCH_TARGET_VERSION=0x020a000000000000"
    assert "torch 2.10 is the oldest that works" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("version", "old"), [("2.9.1", True), ("2.10.0+cpu", False), ("2.13.0a0+git", False)])
def test_a_build_with_an_older_torch_is_refused_in_one_line(build, version, old, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(cpp_extension, "CppExtension", lambda *_, **__: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    if not old:
        assert build.extension_arguments()
        return
    with pytest.raises(SystemExit, match=r"^torch 2\.9\.1 is older than 2\.10; pip install 'torch>=2\.10'$"):
        build.extension_arguments()


@pytest.mark.parametrize("asked", [None, "/elsewhere"])
def test_the_toolkit_is_where_nvcc_says_it_is(build, asked, tmp_path, monkeypatch):
    """What is in PATH may be a script; libraries and headers lie where the compiler itself does."""
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho '#$ TOP={tmp_path}/cuda/bin/..' >&2\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(build.shutil, "which", lambda name: str(nvcc))
    monkeypatch.setattr(cpp_extension, "CppExtension", lambda *_, **__: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CUDA_HOME", asked or "")
    if asked is None:
        monkeypatch.delenv("CUDA_HOME")
    build.extension_arguments()
    assert os.environ["CUDA_HOME"] == (asked or str(tmp_path / "cuda"))
    assert build.toolkit(str(tmp_path / "no-nvcc")) is None


def test_what_the_oldest_torch_does_not_declare_is_found_in_the_built_extension(tmp_path):
    """The stable ABI: what is built with one torch runs with the others (`make host-check` has the real headers)."""
    (library,) = (ROOT / "cuda_ext").glob("_C*.so")
    headers = tmp_path / "torch" / "csrc"
    headers.mkdir(parents=True)
    names = host_check.undeclared(library, tmp_path)
    assert {"aoti_torch_empty_strided", "torch_library_impl"} <= names
    (headers / "shim.h").write_text(" ".join(f"int {name}(int);" for name in names - {"torch_library_impl"}))
    assert host_check.undeclared(library, tmp_path) == {"torch_library_impl"}


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
