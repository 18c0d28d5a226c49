"""Which rank plays which role, on which device and which CPU cores. The one place where device choice lives.

Knows no models and no links; answers questions, and does the pinning it is asked to do.
"""

from __future__ import annotations

import functools
import os
import platform
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from ssd_runtime import hardware
from ssd_runtime.config import Config, Device, ModelConfig
from ssd_runtime.errors import ConfigError

Role = Literal["target", "draft"]
Backend = Literal["gloo", "nccl"]


@dataclass(frozen=True)
class Group:
    """A torchrun that has one role only; the other role has another, which may come and go.

    Attributes:
        role: of all its ranks.
        target: the leader's address, for drafts.
    """

    role: Role
    target: str | None = None


def group_of(role: Role | None, target: str | None) -> Group | None:
    """The group that --role and --target describe, None without; raises ConfigError if they do not go together."""
    if (role == "draft") != (target is not None):
        raise ConfigError("--role draft needs --target HOST:PORT, the address the target prints; nothing else does")
    return None if role is None else Group(role, target)


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
        num_targets: ranks that share the target model, the first of the world.
        group: of a torchrun that has one role only.
    """

    role: Role
    rank: int
    world_size: int
    device: torch.device
    link_backend: Backend
    cores: tuple[int, ...]
    threads: int
    num_targets: int = 1
    group: Group | None = None

    @property
    def num_drafts(self) -> int:
        """In the same torchrun."""
        return 0 if self.group else self.world_size - self.num_targets

    @property
    def drafts_may_come(self) -> bool:
        """Whether this target has drafts, here or from another torchrun."""
        return self.group is not None or self.num_drafts > 0


def place(config: Config, environ: Mapping[str, str], group: Group | None = None) -> Placement:
    """The placement of the rank that torchrun's variables in `environ` describe; without them, of a target alone.

    Args:
        group: if this torchrun has one role only.

    Raises:
        ConfigError: ranks that cannot work, no GPU for this rank, cores that are not allowed.
    """
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    num_targets = config.target.tensor_parallel
    role = role_of(rank, world_size, num_targets) if group is None else _role_in(group, config, world_size)
    if group is None and world_size == num_targets and config.speculation.mode in ("sd", "ssd"):
        raise ConfigError(
            f"speculation.mode = {config.speculation.mode} needs {num_targets + 1} ranks "
            f"({_who(num_targets)}), not {world_size}; without a draft only ar and sd-colocated are possible"
        )
    local_rank = _number(environ, "LOCAL_RANK", rank)
    first = rank - local_rank  # of this host: torchrun numbers its ranks in a row
    ranks_here = _number(environ, "LOCAL_WORLD_SIZE", world_size)
    targets_here = max(0, min(num_targets - first, ranks_here)) if role == "target" or group is None else 0
    here = _roles_here(targets_here, ranks_here)
    if group is not None and group.target is not None and _is_here(group.target):
        here, targets_here = ("target", "draft"), num_targets  # leave the target its cores
    model = config.target if role == "target" else config.draft
    cores = choose_cores(config, allowed_cores(), here, targets_here).of(role)
    if role == "target":
        cores = share_out(cores, local_rank, targets_here)
    return Placement(
        role=role,
        rank=rank,
        world_size=world_size,
        device=device_for(model.device, local_rank),
        link_backend=link_backend(config.target.device, config.draft.device),
        cores=cores,
        threads=model.threads,
        num_targets=num_targets,
        group=group,
    )


def _role_in(group: Group, config: Config, world_size: int) -> Role:
    if config.speculation.mode not in ("sd", "ssd"):
        raise ConfigError(f"--role {group.role} needs speculation.mode sd or ssd, not {config.speculation.mode}")
    if group.role == "target" and world_size != config.target.tensor_parallel:
        raise ConfigError(
            f"--role target needs {config.target.tensor_parallel} ranks (target.tensor_parallel), not {world_size}"
        )
    return group.role


def _is_here(address: str) -> bool:
    """Whether an address of another process is one of this host; a name is taken for another host's."""
    host = address.removeprefix("tcp://").rpartition(":")[0]
    try:
        with socket.socket() as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def settle(placement: Placement) -> None:
    """Move this process to its place: cores, compute threads, current GPU. Call before anything starts threads.

    A rank on a GPU whose cores are not named goes to those near its GPU, as far as NVML knows them.
    """
    cores = placement.cores
    if not cores and placement.device.type == "cuda":
        cores = hardware.near_cores(hardware.read(), placement.device.index, allowed_cores())
    pin(cores, placement.threads)
    if placement.device.type == "cuda":
        torch.cuda.set_device(placement.device)


def cores_by_role(config: Config, world_size: int) -> dict[str, tuple[int, ...]]:
    """The cores of each role of a world on this host, for people to see; of several target ranks, of each."""
    num_targets = config.target.tensor_parallel
    here = _roles_here(num_targets, world_size)
    cores = choose_cores(config, allowed_cores(), here, num_targets)
    if num_targets == 1:
        return {role: cores.of(role) for role in here}
    named = {f"target {rank}": share_out(cores.target, rank, num_targets) for rank in range(num_targets)}
    return named | {role: cores.of(role) for role in here if role != "target"}


def _roles_here(num_targets: int, num_ranks: int) -> tuple[Role, ...]:
    """The roles of the ranks of one host, of which the first `num_targets` are targets."""
    target: tuple[Role, ...] = ("target",) if num_targets else ()
    return (*target, "draft") if num_ranks > num_targets else target


def share_out(cores: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    """The cores of one of `count` ranks that divide `cores`; with fewer cores than ranks, one that others have too."""
    if len(cores) < count:
        return tuple(cores[index % len(cores) :][:1]) if cores else ()
    return tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def role_of(rank: int, world_size: int, num_targets: int = 1) -> Role:
    """The first `num_targets` ranks are targets, the next one the draft, if there is one. Others are a ConfigError."""
    if world_size not in (num_targets, num_targets + 1):
        raise ConfigError(
            f"{world_size} ranks cannot be used: start {num_targets + 1} ({_who(num_targets)}) "
            f"or {num_targets} (target alone, no draft)"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in a world of {world_size}: ranks are 0 to {world_size - 1}")
    return "target" if rank < num_targets else "draft"


def _who(num_targets: int) -> str:
    targets = "rank 0 target" if num_targets == 1 else f"ranks 0 to {num_targets - 1} target"
    return f"{targets}, rank {num_targets} draft"


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


def group_backend(target: Device) -> Backend:
    """What carries the tensors between the ranks of one target."""
    return "nccl" if target == "cuda" else "gloo"


def link_device(backend: Backend, device: torch.device) -> torch.device:
    """Where the frames of a rank on `device` live."""
    return device if backend == "nccl" else torch.device("cpu")


@functools.cache
def allowed_cores() -> tuple[int, ...]:
    """The cores this process might run on when first asked, ascending: pinning does not change the answer."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def choose_cores(
    config: Config, allowed: Sequence[int], here: Sequence[Role] = ("target", "draft"), num_targets: int = 1
) -> Cores:
    """Cores of each role on one host: the target's first, the draft's beside them, as many as each has threads.

    Cores that the configuration names are taken as named and the others go around them. With too few cores for both,
    the roles share the last one. A role on a GPU is not pinned unless its cores are named.

    Args:
        config: threads, devices and named cores of each role.
        allowed: cores to choose from.
        here: roles on this host.
        num_targets: target ranks on this host, which divide the target's cores (`share_out`).

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
        wanted = models[role].threads * (num_targets if role == "target" else 1)
        chosen[role] = tuple(free[: max(1, min(wanted, len(free) - still_to_come))])
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
    found = hardware.read()
    if not found.gpus:
        return [f"gpu      none seen ({found.why_none})"]
    return [
        f"gpu {i}    {gpu.name}, {gpu.memory_free / 2**30:.1f} of {gpu.memory_total / 2**30:.1f} GiB free, "
        f"{gpu.nvlinks} NVLinks, near cores {listed(gpu.cores) or 'unknown'}"
        for i, gpu in enumerate(found.gpus)
    ]


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
