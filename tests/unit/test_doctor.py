"""What `ssd doctor` says about the operators in use, and about a target of several ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cuda_ext import ops, reference
from launcher import doctor
from ssd_runtime import topology
from ssd_runtime.config import Config, load_config
from tests.tiny_models import write_hf


def operators() -> doctor.Finding:
    return next(found for found in doctor.examine(Config()) if found.subject == "operators")


@pytest.mark.parametrize(
    ("has_cuda_kernels", "says"),
    [(True, "CUDA kernels built in"), (False, "CUDA kernels not built in (plain torch serves CUDA tensors)")],
)
def test_it_names_the_cpu_level_and_whether_there_are_cuda_kernels(monkeypatch, has_cuda_kernels, says):
    kernels = SimpleNamespace(HAS_CUDA_KERNELS=has_cuda_kernels, cpu_level=lambda: "avx2")
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    assert operators() == doctor.Finding("operators", True, f"compiled extension: CPU kernels avx2, {says}")


def test_it_tells_plain_torch_that_was_asked_for_from_an_extension_that_is_missing(monkeypatch):
    monkeypatch.setattr(ops, "_kernels", lambda: reference)
    monkeypatch.setenv("SSD_CUDA_EXT", "0")
    assert operators().detail == "plain torch, which is slower (SSD_CUDA_EXT=0 asks for it)"
    monkeypatch.delenv("SSD_CUDA_EXT")
    assert operators().detail == "plain torch, which is slower (`make ext` builds the extension)"


def test_a_shared_target_is_described_rank_by_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2))
    path = write_hf(tmp_path / "model")
    asked = [f"target.model={path}", f"draft.model={path}"]
    found = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "target.tensor_parallel=2"]))}
    assert all(one.ok for one in found.values()), found
    assert "target shared by 2 ranks over gloo (rank 0 on cpu, rank 1 on cpu)" in found["devices"].detail
    assert found["cores"].detail.endswith("target 0 on [0], target 1 on [1], draft on [2]")
    assert found["target shares"].detail.startswith("a rank of 2 holds 2 heads, 1 key-value heads, 24 inner features")
    assert "a rank" in found["target KV cache"].detail

    refused = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "target.tensor_parallel=3"]))}
    assert "possible are 1, 2, 4" in refused["target shares"].detail
    assert not refused["target shares"].ok
    assert not refused["target KV cache"].ok
    several = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "deployment.drafts=2"]))}
    assert all(one.ok for one in several.values()), several
    assert several["devices"].detail == "target on cpu, 2 drafts (rank 1 on cpu, rank 2 on cpu), links over gloo"
    assert several["cores"].detail.endswith("target on [0], draft 1 on [1], draft 2 on [2]")
    assert several["draft rank 2"].detail.startswith("cpu, cores 2: ")
    too_many = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "deployment.drafts=3"]))}
    assert too_many["cores"].detail.startswith("draft 1 and draft 3 share core 1: they draft in turns")
    crowded = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "target.tensor_parallel=4"]))}
    assert "target 0 and target 2 share core 0; target 1 and target 3 share core 1" in crowded["cores"].detail
