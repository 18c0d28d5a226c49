"""What `ssd doctor` says about the operators in use, and about a target of several ranks."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from cuda_ext import ops, reference
from launcher import doctor
from launcher.cli import main
from launcher.findings import Finding
from launcher.nodes import seats_of
from ssd_runtime.config import Config, load_config
from ssd_runtime.errors import ConfigError
from ssd_runtime.host import topology
from tests.tiny_models import write_hf


def operators() -> Finding:
    return next(found for found in doctor.examine(Config()) if found.subject == "operators")


@pytest.mark.parametrize(
    ("has_cuda_kernels", "says"),
    [(True, "CUDA kernels built in"), (False, "CUDA kernels not built in (plain torch serves CUDA tensors)")],
)
def test_it_names_the_cpu_level_and_whether_there_are_cuda_kernels(monkeypatch, has_cuda_kernels, says):
    kernels = SimpleNamespace(HAS_CUDA_KERNELS=has_cuda_kernels, cpu_level=lambda: "avx2")
    monkeypatch.setattr(ops, "_kernels", lambda: kernels)
    assert operators() == Finding("operators", True, f"compiled extension: CPU kernels avx2, {says}")


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
    assert found["cores"].detail.endswith("target 0 on core 0, target 1 on core 1, draft on core 2")
    assert found["target shards"].detail.startswith("a rank of 2 holds 2 heads, 1 key-value heads, 24 inner features")
    assert "GiB of weights, 512 KV blocks (8192 tokens) in 0.00 GiB" in found["target rank 1"].detail

    refused = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "target.tensor_parallel=3"]))}
    assert "possible are 1, 2, 4" in refused["target shards"].detail
    assert not refused["target shards"].ok
    several = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "deployment.drafts=2"]))}
    assert all(one.ok for one in several.values()), several
    assert several["devices"].detail == "target on cpu, 2 drafts (rank 1 on cpu, rank 2 on cpu), links over gloo"
    assert several["cores"].detail.endswith("target on core 0, draft 1 on core 1, draft 2 on core 2")
    assert several["draft rank 2"].detail.startswith("cpu, cores 2: ")
    too_many = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "deployment.drafts=3"]))}
    assert too_many["cores"].detail.startswith("draft 1 and draft 3 share core 1: they draft in turns")
    crowded = {one.subject: one for one in doctor.examine(load_config(None, [*asked, "target.tensor_parallel=4"]))}
    assert "target 0 and target 2 share core 0; target 1 and target 3 share core 1" in crowded["cores"].detail


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options for tiny models, four of whose ranks could share one, on hosts of three cores."""
    monkeypatch.setattr(topology, "allowed_cores", lambda: (0, 1, 2))
    path = write_hf(tmp_path / "model")
    return [f"target.model={path}", f"draft.model={path}", "target.tensor_parallel=2"]


def told(config: Config, *where: object) -> dict[str, Finding]:
    return {one.subject: one for one in doctor.examine(config, seats_of(config, *where))}  # type: ignore[arg-type]


def test_the_ranks_of_several_nodes_are_told_node_by_node(asked: list[str]) -> None:
    found = told(load_config(None, asked), 2)
    assert found["nodes"].detail.startswith("node 0 runs target ranks 0-1; node 1 runs draft rank 2 (taken to be like")
    assert found["devices"].detail.endswith("rank 1 on cpu of node 0), draft on cpu of node 1, link over gloo")
    assert found["cores of node 0"].detail.endswith("target 0 on core 0, target 1 on core 1")
    assert found["cores of node 1"].detail.endswith("; draft on core 0")
    assert found["draft rank 2"].detail.startswith("cpu of node 1, cores 0: ")
    assert found["target and draft"].detail.startswith("joined by the network between nodes")
    assert all(one.ok for one in found.values()), found


def test_a_target_that_is_spread_over_nodes_fails(asked: list[str]) -> None:
    found = told(load_config(None, asked), 2, "1,2")
    assert "node 1 runs target rank 1 and draft rank 2" in found["nodes"].detail
    assert not found["placement"].ok
    assert "target ranks are spread over nodes 0-1" in found["placement"].detail


def test_ranks_of_one_role_are_looked_at_alone(asked: list[str]) -> None:
    config = load_config(None, asked)
    target, draft = told(config, 1, None, "target"), told(config, 1, None, "draft")
    assert {"front door", "target model", "target rank 1", "target shards"} <= set(target)
    assert not {"draft model", "vocabularies", "draft rank 2"} & set(target)
    assert {"draft model", "draft rank 2"} <= set(draft)
    assert not {"front door", "target model", "target rank 0", "target shards", "vocabularies"} & set(draft)
    assert draft["devices"].detail == "draft on cpu"
    with pytest.raises(ConfigError, match=r"--role draft needs speculation\.mode sd or ssd, not ar"):
        told(load_config(None, ["speculation.mode=ar"]), 1, None, "draft")


def test_nodes_that_cannot_be_are_one_line_and_exit_code_2(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "--nnodes", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ssd: error: 3 nodes are too many for 2 rank(s) (1 target and 1 draft)")
