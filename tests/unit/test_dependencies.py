"""What runs without which packages: a machine with a GPU and no network has what it has."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.tiny_models import write_hf

ROOT = Path(__file__).parents[2]
MODULE_OF = {"pyzmq": "zmq", "nvidia-ml-py": "pynvml"}  # the others are imported as they are called
WITHOUT_ALL = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))  # None: importing it raises ModuleNotFoundError

import torch
import cuda_ext.ops
import ssd_runtime.comm.link.endpoint, tests.inproc_links, ssd_runtime.comm.link.setup
import ssd_runtime.draft.drafter, ssd_runtime.draft.loop
import ssd_runtime.engine.engine, ssd_runtime.engine.numerics
import ssd_runtime.draft.colocated, ssd_runtime.leader.draft_peer, ssd_runtime.leader.link_speculator
import ssd_runtime.leader.replay
from ssd_runtime.model.load import load_decoder

del sys.modules["safetensors"]
load_decoder(sys.argv[1], "fp32", torch.device("cpu"))

del sys.modules["tokenizers"], sys.modules["jinja2"]
from ssd_runtime.model.files.header import inspect_model
inspect_model(sys.argv[1])
"""
GPU_TESTS = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))

import pytest
sys.exit(pytest.main(["tests/gpu", "-rs", "-o", "addopts=", "-p", "no:cacheprovider"]))
"""


def dependencies(*extras: str) -> set[str]:
    """The modules of what pyproject.toml demands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = [re.split(r"[<>=~! ]", line)[0] for line in lines]
    return {MODULE_OF.get(name, name).replace("-", "_") for name in names}


def run_without(missing: set[str], code: str, *arguments: str, **environment: str) -> str:
    """What the code prints in a Python where these modules cannot be imported."""
    command = [sys.executable, "-c", code, *arguments, *sorted(missing)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_engine_and_drafter_need_torch_alone_and_a_hugging_face_model_nothing_of_gguf(tmp_path):
    missing = dependencies() - {"torch", "numpy"}
    assert {"zmq", "gguf", "msgpack", "pynvml", "tokenizers", "safetensors", "jinja2"} <= missing
    run_without(missing, WITHOUT_ALL, write_hf(tmp_path / "model"))


def test_the_suite_for_gpus_needs_torch_pytest_and_hypothesis_alone():
    """And is skipped where there is no GPU; none of pytest's plugins is there, so none of their options."""
    missing = dependencies("test") - {"torch", "numpy", "pytest", "hypothesis"}
    said = run_without(missing, GPU_TESTS, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", CUDA_VISIBLE_DEVICES="")
    assert re.search(r"\d+ skipped", said)
    assert "no GPU" in said or "CPU build" in said
