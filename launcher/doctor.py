"""Can this machine run this configuration? A list of findings. Changes nothing, starts nothing."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher import preflight
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
    yield _finding("devices", lambda: _devices(config))
    yield _finding("cores", lambda: _cores(config))
    yield _finding("front door", lambda: _front_door(config))
    for role in ("target", "draft"):
        yield _finding(f"{role} model", lambda role=role: _model(getattr(config, role)))  # type: ignore[misc]
    yield _finding("vocabularies", lambda: _vocabularies(config))
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

    backend = ops.backend()
    return "compiled extension" if backend == "compiled" else "plain torch (slower; `make ext` builds the extension)"


def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    return found or "none found; the compiled extension cannot be rebuilt here"


def _devices(config: Config) -> str:
    import torch

    count = torch.cuda.device_count()
    wanted = sum(model.device == "cuda" for model in (config.target, config.draft))
    if wanted > count:
        raise ConfigError(f'the configuration wants {wanted} GPUs, this machine offers {count}; set device = "cpu"')
    gpus = ", ".join(torch.cuda.get_device_name(i) for i in range(count))
    return f"{count} GPUs ({gpus})" if count else "CPU only"


def _cores(config: Config) -> str:
    allowed = sorted(os.sched_getaffinity(0))
    for role in ("target", "draft"):
        missing = set(getattr(config, role).cores) - set(allowed)
        if missing:
            raise ConfigError(f"{role}.cores names {sorted(missing)}, this process may use {allowed}")
    overlap = set(config.target.cores) & set(config.draft.cores)
    if overlap:
        raise ConfigError(f"target.cores and draft.cores share {sorted(overlap)}; drafting would not hide")
    wanted = sum(model.threads for model in (config.target, config.draft) if model.device == "cpu")
    if wanted > len(allowed):
        raise ConfigError(f"the roles want {wanted} cores, {len(allowed)} are there; drafting would not hide")
    return f"{len(allowed)} usable, {wanted} wanted"


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


def _vocabularies(config: Config) -> str:
    target, draft = preflight.inspect(config)
    reason = target.vocabulary.difference(draft.vocabulary)
    if reason is not None:
        raise ConfigError(reason)
    return "target and draft agree"


def _kv(config: Config, role: str) -> str:
    engine, arch = config.engine, _card(getattr(config, role)).arch
    blocks = engine.num_blocks or engine.max_num_seqs * -(-engine.max_model_len // engine.block_size)
    slots = blocks * engine.block_size
    size = 4 if getattr(config, role).dtype == "fp32" else 2
    memory = slots * arch.num_layers * 2 * arch.num_kv_heads * arch.head_dim * size
    return f"{memory / GIB:.2f} GiB for {slots} slots (scratch rows apart)"
