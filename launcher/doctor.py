"""Can this machine run this configuration? A list of findings. Changes nothing, starts nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher import nccl, preflight
from launcher.torchrun import num_ranks
from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.errors import ConfigError, SsdError

if TYPE_CHECKING:
    from ssd_runtime.model.load import ModelCard

GIB = 2**30


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    ok: bool
    detail: str


def examine(config: Config) -> Iterator[Finding]:
    """Look at everything a run needs, cheapest first."""
    yield Finding("python", sys.version_info >= (3, 11), f"{platform.python_version()} (3.11 or newer)")
    yield _finding("torch", _torch)
    yield _finding("operators", _operators)
    yield _finding("compiler", _compiler)
    yield _finding("hardware", _hardware)
    yield _finding("devices", lambda: _devices(config))
    yield _finding("cores", lambda: _cores(config))
    yield _finding("front door", lambda: _front_door(config))
    for role in ("target", "draft"):
        yield _finding(f"{role} model", lambda role=role: _model(getattr(config, role)))  # type: ignore[misc]
    if config.target.tensor_parallel > 1:
        yield _finding("target shares", lambda: _shares(config))
    yield _finding("vocabularies", lambda: _vocabularies(config))
    yield from _placement(config)
    if "cuda" in (config.target.device, config.draft.device):
        yield from (Finding(one.name, True, f"{one.value}: {one.reason}") for one in nccl.settings(os.environ))
    for role in ("target", "draft"):
        yield _finding(f"{role} KV cache", lambda role=role: _kv(config, role))  # type: ignore[misc]


def _finding(subject: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(subject, True, look())
    except (SsdError, ImportError) as error:
        return Finding(subject, False, str(error))


def _torch() -> str:
    import torch

    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 10):
        raise ConfigError(f"{torch.__version__} is older than 2.10; pip install 'torch==2.13.*'")
    distributed = "gloo" + (" and nccl" if torch.distributed.is_nccl_available() else ", no nccl")
    return f"{torch.__version__}, {distributed}"


def _operators() -> str:
    from cuda_ext import ops

    return ops.about()


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    return found or "none found; the compiled extension cannot be rebuilt here"


def _devices(config: Config) -> str:
    from ssd_runtime import topology

    count, drafts = config.target.tensor_parallel, config.deployment.drafts
    models = [config.target] * count + [config.draft] * drafts
    devices = [str(topology.device_for(model.device, rank)) for rank, model in enumerate(models)]
    backend = topology.link_backend(config.target.device, config.draft.device)
    target = f"target on {devices[0]}"
    if count > 1:
        ranks = ", ".join(f"rank {rank} on {device}" for rank, device in enumerate(devices[:count]))
        target = f"target shared by {count} ranks over {topology.group_backend(config.target.device)} ({ranks})"
    if drafts == 1:
        return f"{target}, draft on {devices[count]}, link over {backend}"
    ranks = ", ".join(f"rank {rank} on {device}" for rank, device in enumerate(devices[count:], count))
    return f"{target}, {drafts} drafts ({ranks}), links over {backend}"


def _cores(config: Config) -> str:
    from ssd_runtime import topology
    from ssd_runtime.cores import crowding

    placed = topology.cores_by_role(config, config.target.tensor_parallel + config.deployment.drafts)
    if (crowd := crowding(placed)) is not None:
        raise ConfigError(crowd)
    usable = len(topology.allowed_cores())
    return f"{usable} usable; " + ", ".join(f"{role} on {list(numbers)}" for role, numbers in placed.items())


def _hardware() -> str:
    from ssd_runtime import topology

    return "; ".join(" ".join(line.split()) for line in topology.describe().splitlines())


def _front_door(config: Config) -> str:
    preflight.check_port(config)
    return f"{config.serve.host}:{config.serve.port or 'any free port'}"


def _card(model: ModelConfig) -> ModelCard:
    from ssd_runtime.model.catalogue import resolve
    from ssd_runtime.model.load import inspect_model

    return inspect_model(resolve(model.model))


def _model(model: ModelConfig) -> str:
    card = _card(model)
    arch = card.arch
    shape = f"{arch.num_layers} layers, hidden {arch.hidden_size}, vocabulary {arch.vocab_size}"
    return f"{model.model} ({card.format}): {shape}, as {model.dtype}"


def _shares(config: Config) -> str:
    from ssd_runtime.model.parallel import ShardPlan

    card = _card(config.target)
    preflight.check_shares(config, card)
    part = ShardPlan(card.arch, 0, config.target.tensor_parallel).local
    heads = f"{part.num_heads} heads, {part.num_kv_heads} key-value heads, {part.intermediate_size} inner features"
    return f"a rank of {config.target.tensor_parallel} holds {heads}, {part.vocab_size} tokens"


def _placement(config: Config) -> Iterator[Finding]:
    """The plan, rank by rank, and each of its faults."""
    from launcher import placement
    from ssd_runtime import hardware, topology

    try:
        target, draft = (_card(model).arch for model in (config.target, config.draft))
        plan = placement.plan(config, hardware.read(), target, draft, num_ranks(config), topology.allowed_cores())
    except (SsdError, ImportError):
        return  # the findings about models and cores say it
    for one in plan.ranks:
        yield Finding(f"{one.role} rank {one.rank}", True, placement.describe(one, config.engine.block_size))
    for role, joint in (("target ranks", plan.target_joint), ("target and draft", plan.link_joint)):
        if joint is not None:
            yield Finding(role, True, f"joined by {placement.JOINTS[joint]}")
    for warning in plan.warnings:
        yield Finding("placement", False, warning)


def _vocabularies(config: Config) -> str:
    target, draft = preflight.inspect(config)
    reason = target.vocabulary.difference(draft.vocabulary)
    if reason is not None:
        raise ConfigError(reason)
    return "target and draft agree"


def _kv(config: Config, role: str) -> str:
    from ssd_runtime.model.parallel import ShardPlan

    engine, arch, count = config.engine, _card(getattr(config, role)).arch, getattr(config, role).tensor_parallel
    if count > 1:
        arch = ShardPlan(arch, 0, count).local
    slots = engine.pool_blocks * engine.block_size
    size = 4 if getattr(config, role).dtype == "fp32" else 2
    memory = slots * arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim * size
    each = " a rank" if count > 1 else ""
    return f"{memory / GIB:.2f} GiB{each} for {slots} slots (scratch rows apart)"
