"""Which operators a process gets, and that the CPU levels below AVX-512 give the same results."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cuda_ext import ops, reference


def run_python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.strip()


def test_importing_ops_loads_no_library():
    code = "import sys, cuda_ext.ops; print('cuda_ext.compiled' in sys.modules)"
    assert run_python(code) == "False"


def test_plain_torch_can_be_asked_for():
    assert run_python("from cuda_ext import ops; print(ops.backend())", SSD_CUDA_EXT="0") == "plain"


def test_a_library_that_is_not_built_leaves_plain_torch():
    code = "import sys; sys.modules['cuda_ext.compiled'] = None\nfrom cuda_ext import ops; print(ops.backend())"
    assert run_python(code) == "plain"


def test_the_extension_has_every_operator_and_it_is_picked_once():
    compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    for name in reference.__all__:
        assert getattr(ops, name) is vars(ops)[name] is getattr(compiled, name)


LEVEL_DIGEST = """
import hashlib, torch
from cuda_ext import compiled
generator = torch.Generator().manual_seed(0)
x, weight = torch.randn(5, 130, generator=generator), torch.randn(70, 130, generator=generator)
out = compiled.linear_int8(x, compiled.pack_int8(weight), None)
print(compiled.cpu_level(), hashlib.sha256(out.numpy().tobytes()).hexdigest())
for kind in ("bf16", "fp32"):
    out = getattr(compiled, f"linear_{kind}")(x, getattr(compiled, f"pack_{kind}")(weight), None)
    torch.testing.assert_close(out, x @ weight.T, rtol=3e-2, atol=0.3)
"""


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_cpu_levels_give_the_same_integers(level):
    pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    if level not in refusal("avx521"):
        pytest.skip(f"this CPU has no {level}")
    picked, digest = run_python(LEVEL_DIGEST, SSD_CPU_LEVEL=level).split()
    assert picked == level
    assert digest == run_python(LEVEL_DIGEST, SSD_CPU_LEVEL="").split()[1]


@functools.cache
def refusal(level: str) -> str:
    """What is said of a level; "" if it is picked."""
    code = """
from ssd_runtime import environment
from ssd_runtime.errors import ConfigError
try:
    environment.check_operators()
except ConfigError as error:
    print(error)
"""
    return run_python(code, SSD_CPU_LEVEL=level)


def test_a_cpu_level_that_is_mistyped_or_not_run_here_is_refused_and_the_others_are_named():
    pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    said = refusal("avx521")
    assert said.startswith("SSD_CPU_LEVEL=avx521 is no level of kernels that this CPU runs: ")
    named = said.partition("runs: ")[2].partition(";")[0].split(", ")
    assert {"baseline"} <= set(named) <= {"baseline", "avx2", "avx512"}
    for level in {"avx2", "avx512"} - set(named):
        assert refusal(level).startswith(f"SSD_CPU_LEVEL={level} is no level")


def test_every_operator_serves_cuda_and_meta_tensors_but_those_that_python_picks_by_device():
    pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    picked = {
        "paged_attention",
        "pack_grouped",
        "linear_grouped",
        "pack_linear",
        "linear_int8",
        "linear_bf16",
        "linear_fp32",
        "decoder_layers_",
        "cpu_level",
        "huge_memory",
    }
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("ssd_runtime::") and (operator := name.split("::")[1].split(".")[0]) not in picked:
            for key in ("CUDA", "Meta"):
                assert torch._C._dispatch_has_kernel_for_dispatch_key(f"ssd_runtime::{operator}", key), (operator, key)


@pytest.mark.parametrize("kind", ["int8", "bf16", "fp32"])
def test_weights_of_another_device_stay_plain(kind):
    compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    packed = getattr(compiled, f"pack_{kind}")(torch.empty(4, 8, device="meta"))
    assert packed.data.shape == (4, 8)
    assert getattr(compiled, f"linear_{kind}")(torch.empty(3, 8, device="meta"), packed, None).shape == (3, 4)


def test_grouped_weights_of_another_device_stay_plain():
    compiled = pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    packed = compiled.pack_grouped(torch.empty(4, 8, device="meta"), 4)
    assert packed.data.shape == (4, 8)
    assert compiled.linear_grouped(torch.empty(3, 8, device="meta"), packed, None).shape == (3, 4)


@pytest.mark.parametrize("has_cuda_kernels", [True, False])
def test_compiled_kernels_serve_a_gpu_only_where_they_were_built_for_one(monkeypatch, has_cuda_kernels):
    monkeypatch.setattr(ops, "_kernels", lambda: SimpleNamespace(HAS_CUDA_KERNELS=has_cuda_kernels))
    assert ops.compiled_for(torch.device("cpu"))
    assert ops.compiled_for(torch.device("cuda", 1)) == has_cuda_kernels
    assert not ops.compiled_for(torch.device("meta"))
    monkeypatch.setattr(ops, "_kernels", lambda: reference)
    assert not ops.compiled_for(torch.device("cpu"))


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
def test_the_fallback_of_rope_write_does_what_plain_torch_does(kv_dtype):
    pytest.importorskip("cuda_ext.compiled", reason="cuda_ext._C is not built", exc_type=ImportError)
    from cuda_ext import fallbacks

    generator = torch.Generator().manual_seed(0)
    results = []
    for rope_write in (fallbacks.rope_write_, reference.rope_write_):
        generator.manual_seed(0)
        fused, angles = torch.randn(3, 5, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
        kv = torch.zeros(2, 6, 1, 8, dtype=kv_dtype)
        rope_write(fused[:, :3], fused[:, 3:4], fused[:, 4:], *angles, kv, torch.tensor([5, 0, 2]))
        results.append((fused, kv))
    for own, plain in zip(*results, strict=True):
        assert torch.equal(own, plain)
