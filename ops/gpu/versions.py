"""Versions, imports, and which operators this process runs.

Imports everything that the product needs and says what is missing; a GPU must answer with a sum.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import shutil
from collections.abc import Iterator

from ops.gpu.result import Finding, Number, Setting, judged, left_out, run_step

IMPORTED = {  # module: distribution
    "torch": "torch",
    "numpy": "numpy",
    "zmq": "pyzmq",
    "msgpack": "msgpack",
    "msgspec": "msgspec",
    "click": "click",
    "tokenizers": "tokenizers",
    "safetensors": "safetensors",
    "gguf": "gguf",
    "jinja2": "jinja2",
    "pynvml": "nvidia-ml-py",
    "rich": "rich",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "launcher.cli": "",
}
IMPORTED_ON_GPU = {"triton": "triton"}
TOOLS = ("nvcc", "ninja", "c++", "ncu", "nvidia-smi", "taskset")


def find(setting: Setting) -> Iterator[Finding]:
    on_gpu = IMPORTED_ON_GPU if setting.device == "cuda" else {}
    for module, distribution in (IMPORTED | on_gpu).items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            yield judged(f"import {module}", False, note=str(error))
        else:
            version = importlib.metadata.version(distribution) if distribution else "this tree"
            yield Finding(f"import {module}", (Number("version", version),))
    for tool in TOOLS:
        yield Finding(f"command {tool}", (Number("path", shutil.which(tool) or "not there"),))
    yield operators(setting)
    yield device(setting)


def operators(setting: Setting) -> Finding:
    """The build that was carried must load: everything after this step rests on it."""
    import torch

    from cuda_ext import ops

    compiled = ops.backend() == "compiled" and ops.compiled_for(torch.device(setting.device))
    return judged(f"compiled operators for {setting.device}", compiled, note=ops.about())


def device(setting: Setting) -> Finding:
    import torch

    if setting.device == "cpu":
        return left_out("the GPU answers", "no GPU asked for")
    properties = torch.cuda.get_device_properties(0)
    total = int(torch.arange(1000, device="cuda").sum())
    memory = Number("memory", properties.total_memory / 2**30, "GiB")
    return judged("the GPU answers", total == 499500, memory, Number("SMs", properties.multi_processor_count))


if __name__ == "__main__":
    raise SystemExit(run_step(__file__, __doc__, find))
