"""Which rank plays which role, on which device and which CPU cores. The one place where device choice lives.

Knows no models and no links; answers questions, and does the pinning it is asked to do.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ssd_runtime.config import Config, Device, ModelConfig
from ssd_runtime.errors import ConfigError

Role = Literal["target", "draft"]
Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Cores:
    """CPU cores of each role; a role that is elsewhere, or on a GPU and not pinned, has none."""

    target: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()

    def of(self, role: Role) -> tuple[int, ...]:
        return self.target if role == "target" else self.draft


@dataclass(frozen=True)
class Placement:
    """Where one rank runs.

    Attributes:
        device: of its model and KV cache.
        link_backend: what carries the frames between the two roles.
        cores: CPU cores to be pinned to; empty means not pinned.
        threads: compute threads.
    """

    role: Role
    rank: int
    world_size: int
    device: torch.device
    link_backend: Backend
    cores: tuple[int, ...]
    threads: int


def place(config: Config, environ: Mapping[str, str]) -> Placement:
    """The placement of the rank that torchrun's variables in `environ` describe; without them, of a target alone.

    Raises:
        ConfigError: ranks that cannot work, no GPU for this rank, cores that are not allowed.
    """
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    role = role_of(rank, world_size)
    if world_size == 1 and config.speculation.mode in ("sd", "ssd"):
        raise ConfigError(
            f"speculation.mode = {config.speculation.mode} needs 2 ranks (rank 0 target, rank 1 draft), not 1; "
            "with one rank only ar and sd-colocated are possible"
        )
    here: tuple[Role, ...] = ("target", "draft") if _number(environ, "LOCAL_WORLD_SIZE", world_size) > 1 else (role,)
    model = config.target if role == "target" else config.draft
    return Placement(
        role=role,
        rank=rank,
        world_size=world_size,
        device=device_for(model.device, _number(environ, "LOCAL_RANK", rank)),
        link_backend=link_backend(config.target.device, config.draft.device),
        cores=choose_cores(config, allowed_cores(), here).of(role),
        threads=model.threads,
    )


def settle(placement: Placement) -> None:
    """Move this process to its place: cores, compute threads, current GPU. Call before anything starts threads."""
    pin(placement.cores, placement.threads)
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)


def cores_by_role(config: Config, world_size: int) -> dict[str, tuple[int, ...]]:
    """The cores of each role of a world on this host, for people to see."""
    here: tuple[Role, ...] = ("target", "draft") if world_size > 1 else ("target",)
    cores = choose_cores(config, allowed_cores(), here)
    return {role: cores.of(role) for role in here}


def role_of(rank: int, world_size: int) -> Role:
    """Rank 0 is the target, rank 1 the draft; a world of 1 has only a target. Others are a ConfigError."""
    if world_size not in (1, 2):
        raise ConfigError(
            f"{world_size} ranks cannot be used: start 2 (rank 0 target, rank 1 draft) or 1 (target alone, no draft)"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in a world of {world_size}: ranks are 0 to {world_size - 1}")
    return "target" if rank == 0 else "draft"


def device_for(kind: Device, local_rank: int, device_count: int | None = None) -> torch.device:
    """The device of a rank: the CPU, or the GPU with the number of its rank on this host.

    Args:
        kind: what the configuration asks for.
        local_rank: rank among those on this host.
        device_count: GPUs of this host; None asks torch.

    Raises:
        ConfigError: no GPU for this rank.
    """
    if kind == "cpu":
        return torch.device("cpu")
    count = (torch.cuda.device_count() if torch.cuda.is_available() else 0) if device_count is None else device_count
    if count == 0:
        raise ConfigError('device = "cuda" but torch sees no GPU here; install a CUDA build of torch, or use "cpu"')
    if local_rank >= count:
        raise ConfigError(
            f"local rank {local_rank} wants a GPU of its own but this host has {count}: "
            'start fewer ranks here, or set one role\'s device to "cpu"'
        )
    return torch.device("cuda", local_rank)


def link_backend(target: Device, draft: Device) -> Backend:
    """What carries the frames: NCCL if both ends are GPUs, else Gloo (frames are on the CPU then)."""
    return "nccl" if target == draft == "cuda" else "gloo"


def link_device(backend: Backend, device: torch.device) -> torch.device:
    """Where the frames of a rank on `device` live."""
    return device if backend == "nccl" else torch.device("cpu")


@functools.cache
def allowed_cores() -> tuple[int, ...]:
    """The cores this process might run on when first asked, ascending: pinning does not change the answer."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def choose_cores(config: Config, allowed: Sequence[int], here: Sequence[Role] = ("target", "draft")) -> Cores:
    """Cores of each role on one host: the target's first, the draft's beside them, as many as each has threads.

    Cores that the configuration names are taken as named and the others go around them. With too few cores for both,
    the roles share the last one. A role on a GPU is not pinned unless its cores are named.

    Args:
        config: threads, devices and named cores of each role.
        allowed: cores to choose from.
        here: roles on this host.

    Raises:
        ConfigError: a named core is not allowed here.
    """
    models: dict[Role, ModelConfig] = {role: config.target if role == "target" else config.draft for role in here}
    chosen: dict[Role, tuple[int, ...]] = {}
    for role, model in models.items():
        foreign = set(model.cores) - set(allowed)
        if foreign:
            raise ConfigError(
                f"config key '{role}.cores' names {listed(foreign)}, but this process may only use {listed(allowed)}"
            )
        if model.cores or model.device != "cpu":
            chosen[role] = tuple(model.cores)
    choosing = [role for role in here if role not in chosen]
    for i, role in enumerate(choosing):
        taken = {core for cores in chosen.values() for core in cores}
        free = [core for core in allowed if core not in taken] or list(allowed[-1:])
        still_to_come = len(choosing) - i - 1  # leave one core to each
        chosen[role] = tuple(free[: max(1, min(models[role].threads, len(free) - still_to_come))])
    return Cores(chosen.get("target", ()), chosen.get("draft", ()))


def pin(cores: Iterable[int], threads: int) -> None:
    """Keep this process (its main thread and all threads started later) on `cores`, computing with `threads` threads.

    No cores means no pinning. Call before anything starts threads.
    """
    wanted = set(cores)
    if wanted and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, wanted)
    torch.set_num_threads(min(threads, len(wanted)) if wanted else threads)


def describe() -> str:
    """What there is to run on, a few lines for people. Never fails: what cannot be found out is left out."""
    lines = [
        f"cpu      {_cpu_name()}, cores {listed(allowed_cores())}",
        f"torch    {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
    ]
    return "\n".join(lines + _gpus())


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number; it is torchrun's to set") from None


def _gpus() -> list[str]:
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception as error:  # noqa: BLE001 - no module, no library, no driver: all mean that there is nothing to see
        return [f"gpu      none seen ({type(error).__name__}: {error})"]
    try:
        lines = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            name = pynvml.nvmlDeviceGetName(handle)
            name = name.decode() if isinstance(name, bytes) else name
            lines.append(f"gpu {index}    {name}, {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free")
        return lines or ["gpu      none"]
    except pynvml.NVMLError as error:
        return [f"gpu      cannot be asked ({error})"]
    finally:
        pynvml.nvmlShutdown()


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def listed(cores: Iterable[int]) -> str:
    """0,1,2,3,8 as "0-3,8"."""
    runs: list[list[int]] = []
    for core in sorted(set(cores)):
        if runs and core == runs[-1][1] + 1:
            runs[-1][1] = core
        else:
            runs.append([core, core])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
