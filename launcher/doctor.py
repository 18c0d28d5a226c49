"""Can this machine run this configuration, or nodes like it together? A list of findings. Changes nothing, starts
nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from launcher import preflight
from launcher.findings import Finding
from launcher.nodes import Seat, num_ranks, seats_of, who_runs_what
from launcher.ranks import nccl
from launcher.screen import cores_line
from ssd_runtime import environment
from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.errors import ConfigError, SsdError
from ssd_runtime.host.cores import Role
from ssd_runtime.model import memory
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.files.header import ModelHeader, inspect_model

OLDEST_TORCH = (2, 10)  # as in pyproject.toml


def examine(config: Config, seats: Sequence[Seat] = ()) -> Iterator[Finding]:
    """Look at everything a run needs, cheapest first. Without `seats`, of the whole world on this host."""
    seats = seats or seats_of(config)
    nodes = sorted({seat.node for seat in seats})
    roles = [role for role in ("target", "draft") if any(seat.role == role for seat in seats)]
    yield Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer)")
    yield _finding("torch", _torch)
    yield _finding("operators", _operators)
    yield _finding("compiler", _compiler)
    yield _finding("hardware", _hardware)
    if len(nodes) > 1:
        yield Finding("nodes", True, f"{who_runs_what(seats)} (taken to be like this one)")
    yield _finding("devices", _devices, config, seats)
    for node in nodes:
        which = "cores" if len(nodes) == 1 else f"cores of node {node}"
        yield _finding(which, _cores, config, [seat for seat in seats if seat.node == node])
    if "target" in roles:
        yield _finding("front door", _front_door, config)
    for role in roles:
        yield _finding(f"{role} model", _model, getattr(config, role))
    if "target" in roles and config.target.tensor_parallel > 1:
        yield _finding("target shards", _shards, config)
    if len(roles) == 2:
        yield _finding("vocabularies", _vocabularies, config)
    yield from _placement(config, seats)
    if "cuda" in (config.target.device, config.draft.device):
        yield from (Finding(one.name, True, f"{one.value}: {one.reason}") for one in nccl.settings(os.environ))


def _finding(subject: str, look: Callable[..., str], *at: Any) -> Finding:
    try:
        return Finding(subject, True, look(*at))
    except (SsdError, ImportError) as error:
        return Finding(subject, False, str(error))


def _torch() -> str:
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ConfigError(f"{torch.__version__} is older than {oldest}; pip install 'torch==2.13.*'")
    distributed = "gloo" + (" and nccl" if torch.distributed.is_nccl_available() else ", no nccl")
    return f"{torch.__version__}, {distributed}"


def _operators() -> str:
    from cuda_ext import ops

    environment.check_operators()
    return ops.about()


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    return found or "none found; the compiled extension cannot be rebuilt here"


def _devices(config: Config, seats: Sequence[Seat]) -> str:
    from ssd_runtime.host import topology

    nodes = sorted({seat.node for seat in seats})
    devices: dict[Role, dict[int, str]] = {"target": {}, "draft": {}}
    for node in nodes:
        here = [seat for seat in seats if seat.node == node]
        for seat, device in zip(here, topology.devices_of(config, [seat.role for seat in here]), strict=True):
            devices[seat.role][seat.rank] = f"{device} of node {node}" if len(nodes) > 1 else str(device)
    said = []
    for role, of_role in devices.items():
        ranks = ", ".join(f"rank {rank} on {device}" for rank, device in of_role.items())
        if len(of_role) == 1:
            said.append(f"{role} on {next(iter(of_role.values()))}")
        elif of_role and role == "target":
            over = topology.group_backend(config.target.device)
            said.append(f"target shared by {len(of_role)} ranks over {over} ({ranks})")
        elif of_role:
            said.append(f"{len(of_role)} drafts ({ranks})")
    if len(said) == 2:
        links = "link" if len(devices["draft"]) == 1 else "links"
        said.append(f"{links} over {topology.link_backend(config, os.environ)}")
    return ", ".join(said)


def _cores(config: Config, seats: Sequence[Seat]) -> str:
    """Of the ranks of one node, on a host like this."""
    from ssd_runtime.host import topology
    from ssd_runtime.host.cores import crowding

    here = range(seats[0].rank, seats[-1].rank + 1)
    placed = topology.cores_by_role(config, num_ranks(config), here)
    if (crowd := crowding(placed)) is not None:
        raise ConfigError(crowd)
    usable = len(topology.allowed_cores())
    return f"{usable} usable; {cores_line(placed)}"


def _hardware() -> str:
    from ssd_runtime.host import topology

    return "; ".join(" ".join(line.split()) for line in topology.describe().splitlines())


def _front_door(config: Config) -> str:
    preflight.check_port(config)
    return f"{config.serve.host}:{config.serve.port or 'any free port'}"


def _header(model: ModelConfig) -> ModelHeader:
    return inspect_model(resolve(model.model))


def _model(model: ModelConfig) -> str:
    header = _header(model)
    arch = header.arch
    shape = f"{arch.num_layers} layers, hidden {arch.hidden_size}, vocabulary {arch.vocab_size}"
    return f"{model.model} ({header.format}): {shape}, as {model.dtype}"


def _shards(config: Config) -> str:
    from ssd_runtime.model.parallel import ShardPlan

    header = _header(config.target)
    preflight.check_shards(config, header)
    part = ShardPlan(header.arch, 0, config.target.tensor_parallel).local
    heads = f"{part.num_heads} heads, {part.num_kv_heads} key-value heads, {part.intermediate_size} inner features"
    return f"a rank of {config.target.tensor_parallel} holds {heads}, {part.vocab_size} tokens"


def _placement(config: Config, seats: Sequence[Seat]) -> Iterator[Finding]:
    """The plan, rank by rank, and each of its faults."""
    from launcher import placement
    from ssd_runtime.host import hardware, topology

    try:
        models = {role: _header(getattr(config, role)).arch for role in _roles_on_gpus(config, seats)}
        rdma = hardware.rdma_adapters()
        plan = placement.plan(config, hardware.read(), models, seats, topology.allowed_cores(), rdma)
    except (SsdError, ImportError):
        return  # the findings about models and cores say it
    for one in plan.ranks:
        told = placement.describe(config, one, with_node=seats[-1].node > 0)
        yield Finding(f"{one.role} rank {one.rank}", True, told)
    for role, joint in (("target ranks", plan.target_joint), ("target and draft", plan.link_joint)):
        if joint is not None:
            over = f" (here: {', '.join(rdma)})" if joint == "network" and rdma else ""
            yield Finding(role, True, f"joined by {placement.JOINTS[joint]}{over}")
    for note in plan.notes:
        yield Finding("placement", True, note)
    for warning in plan.warnings:
        yield Finding("placement", False, warning)


def _roles_on_gpus(config: Config, seats: Sequence[Seat]) -> set[Role]:
    """Those whose models are in the memory of the devices of these seats."""
    roles: set[Role] = {seat.role for seat in seats}
    if "target" in roles and config.deployment.holds_draft(config.speculation.mode):
        roles.add("draft")
    if memory.shares_gpu(config):
        roles |= {"target", "draft"}
    return roles


def _vocabularies(config: Config) -> str:
    target, draft = preflight.inspect(config)
    reason = target.vocabulary.difference(draft.vocabulary)
    if reason is not None:
        raise ConfigError(reason)
    return "target and draft agree"
