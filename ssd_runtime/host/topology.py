"""Which rank plays which role, on which device and which CPU cores, by the arithmetic of allotment.py.

Knows no models and no links; answers questions, and moves a process to its place. Commands that start ranks ask this
module too and are to answer at once: torch, which takes seconds to import, is imported where a device is asked for.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ssd_runtime.config import Config, Device
from ssd_runtime.errors import ConfigError
from ssd_runtime.host import hardware
from ssd_runtime.host.allotment import cores_beside, cores_of, gpus_of, lacks_gpus, model_of
from ssd_runtime.host.cores import Claims, Role, allowed_cores, listed, pin
from ssd_runtime.host.hardware import Hardware

if TYPE_CHECKING:
    import torch

Backend = Literal["gloo", "nccl"]
MANY_RANKS_A_GPU = "NCCL_MULTI_RANK_GPU_ENABLE"


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
class Placement:
    """Where one rank runs.

    Attributes:
        device: of its model and KV cache.
        link_backend: what carries the frames between the two roles.
        cores: CPU cores to be pinned to; empty means not pinned.
        threads: compute threads.
        here: the ranks of this host.
        num_targets: ranks that share the target model, the first of the world.
        group: of a torchrun that has one role only.
        claims: `cores` are those to choose from: as many as there are threads, which no other draft of this host has.
    """

    role: Role
    rank: int
    world_size: int
    device: torch.device
    link_backend: Backend
    cores: tuple[int, ...]
    threads: int
    here: range
    num_targets: int = 1
    group: Group | None = None
    claims: bool = False

    @property
    def num_drafts(self) -> int:
        """In the same torchrun."""
        return 0 if self.group else self.world_size - self.num_targets

    @property
    def drafts_may_come(self) -> bool:
        """Whether this target has drafts, here or from another torchrun."""
        return self.group is not None or self.num_drafts > 0

    @property
    def link_gpu(self) -> torch.device | None:
        """Where the frames of the link are, if they travel between GPUs."""
        return self.device if self.link_backend == "nccl" else None


def place(config: Config, environ: Mapping[str, str], group: Group | None = None) -> Placement:
    """The placement of the rank that torchrun's variables in `environ` describe; without them, of a target alone.

    Args:
        group: if this torchrun has one role only.

    Raises:
        ConfigError: ranks that cannot work, no GPU for this rank, cores that are not allowed.
    """
    rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
    num_targets, most_drafts = config.target.tensor_parallel, config.deployment.drafts
    if group is None:
        role = role_of(rank, world_size, num_targets, most_drafts)
        if world_size == num_targets and config.speculation.mode in ("sd", "ssd"):
            raise ConfigError(
                f"speculation.mode = {config.speculation.mode} needs {_wanted(num_targets, most_drafts)}, "
                f"not {world_size}; without a draft only ar and sd-colocated are possible"
            )
    else:
        role = _role_in(group, config, world_size)
    local_rank = _number(environ, "LOCAL_RANK", rank)
    first = rank - local_rank  # of this host: torchrun numbers its ranks in a row
    here = range(first, first + _number(environ, "LOCAL_WORLD_SIZE", world_size))
    roles = [role] * len(here) if group else roles_of(config, here)
    model = model_of(config, role)
    device = devices_of(config, roles)[local_rank]
    allowed, found = allowed_cores(), _hardware(config)
    if group is None or group.target is None:
        cores = cores_of(config, roles, allowed, found)[local_rank]
    else:  # of its target it knows only whether that is on this host
        cores = cores_beside(config, num_targets if _is_here(group.target) else 0, allowed, found)
    return Placement(
        role=role,
        rank=rank,
        world_size=world_size,
        device=device,
        link_backend=link_backend(config, environ),
        cores=cores,
        threads=model.threads,
        here=here,
        num_targets=num_targets,
        group=group,
        claims=group is not None and role == "draft" and model.device == "cpu" and not model.cores,
    )


def roles_of(config: Config, here: range) -> list[Role]:
    """The roles of ranks of a world, whose first `target.tensor_parallel` ranks are targets."""
    return ["target" if rank < config.target.tensor_parallel else "draft" for rank in here]


def devices_of(config: Config, roles: Sequence[Role], device_count: int | None = None) -> list[torch.device]:
    """The device of each rank of one host.

    Args:
        roles: as for `gpus_of`.
        device_count: GPUs of this host; None asks torch.

    Raises:
        ConfigError: there are too few GPUs here.
    """
    import torch

    gpus = gpus_of(config, roles)
    if any(gpu is not None for gpu in gpus):
        if device_count is None:
            device_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device_count == 0:
            raise ConfigError('device = "cuda" but torch sees no GPU here; install a CUDA build of torch, or use "cpu"')
        if lack := lacks_gpus(config, roles, device_count):
            raise ConfigError(lack)
    return [torch.device("cpu") if gpu is None else torch.device("cuda", gpu) for gpu in gpus]


def _hardware(config: Config) -> Hardware:
    """The GPUs of this host, if any role wants one: on a CPU nobody waits for a driver."""
    return hardware.read() if "cuda" in (config.target.device, config.draft.device) else Hardware()


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
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.bind((host, 0))
    except OSError:
        return False
    return True


def settle(placement: Placement, claims: Claims) -> tuple[int, ...]:
    """Move this process to its place: cores, compute threads, current GPU. Call before anything starts threads.

    Args:
        claims: where a draft keeps its cores from other drafts of this host.

    Returns:
        The cores it is pinned to; none if it is not.
    """
    cores = placement.cores
    if placement.claims:
        cores = claims.take(cores, placement.threads)
    elif placement.role == "draft" and placement.device.type == "cpu":
        claims.note(cores)
    pin(cores, placement.threads)
    if placement.device.type == "cuda":
        import torch

        torch.cuda.set_device(placement.device)
    return cores


def cores_by_role(config: Config, world_size: int, here: range | None = None) -> dict[str, tuple[int, ...]]:
    """The cores of the ranks of one host, for people to see: "target" and "draft", with their ranks if several.

    Args:
        here: ranks of this host; None means the whole world.

    Raises:
        ConfigError: a named core is not allowed.
    """
    here = here or range(world_size)
    of_all, roles = roles_of(config, range(world_size)), roles_of(config, here)
    names = [role if of_all.count(role) == 1 else f"{role} {rank}" for rank, role in zip(here, roles, strict=True)]
    return dict(zip(names, cores_of(config, roles, allowed_cores(), _hardware(config)), strict=False))


def role_of(rank: int, world_size: int, num_targets: int = 1, most_drafts: int = 1) -> Role:
    """The first `num_targets` ranks are targets, the others drafts; raises ConfigError for too few or too many."""
    if not num_targets <= world_size <= num_targets + most_drafts:
        more = world_size - num_targets
        remedy = f"; for {more} drafts set deployment.drafts = {more}" if more > most_drafts else ""
        raise ConfigError(
            f"{world_size} ranks cannot be used: start {_wanted(num_targets, most_drafts)} "
            f"or {num_targets} (target alone, no draft){remedy}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in a world of {world_size}: ranks are 0 to {world_size - 1}")
    return "target" if rank < num_targets else "draft"


def _wanted(num_targets: int, most_drafts: int) -> str:
    """How many ranks a world with drafts has, and who they are."""
    targets = "rank 0 target" if num_targets == 1 else f"ranks 0 to {num_targets - 1} target"
    if most_drafts == 1:
        return f"{num_targets + 1} ranks ({targets}, rank {num_targets} draft)"
    last = num_targets + most_drafts - 1
    return f"{num_targets + 1} to {last + 1} ranks ({targets}, up to {most_drafts} drafts from rank {num_targets} on)"


def link_backend(config: Config, environ: Mapping[str, str]) -> Backend:
    """What carries the frames between the two roles; with Gloo they are on the CPU.

    Args:
        environ: of the ranks.

    Raises:
        ConfigError: NCCL between ranks on one GPU, and `environ` does not tell it that they may be.
    """
    backend = config.link.carrier
    if backend == "nccl" and config.deployment.share_gpu and environ.get(MANY_RANKS_A_GPU) != "1":
        raise ConfigError(
            "link.backend = nccl and deployment.share_gpu: NCCL refuses two ranks on one GPU, "
            f'except 2.31 and newer with {MANY_RANKS_A_GPU}=1; set that, or link.backend = "auto"'
        )
    return backend


def group_backend(target: Device) -> Backend:
    """What carries the tensors between the ranks of one target."""
    return "nccl" if target == "cuda" else "gloo"


def describe() -> str:
    """What there is to run on, a few lines for people. Never fails: what cannot be found out is left out."""
    import torch

    found = hardware.read()
    lines = [
        f"cpu      {_cpu_name()}, cores {listed(allowed_cores())}",
        f"torch    {torch.__version__}, CUDA {torch.version.cuda or 'not built in'}",
    ]
    lines += [
        f"gpu {i}    {gpu.name}, {gpu.memory_free / 2**30:.1f} of {gpu.memory_total / 2**30:.1f} GiB free, "
        f"{gpu.nvlinks} NVLinks, near cores {listed(gpu.cores) or 'unknown'}"
        for i, gpu in enumerate(found.gpus)
    ]
    return "\n".join(lines if found.gpus else [*lines, f"gpu      none seen ({found.why_none})"])


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"environment variable {name}={text!r} is not a number; it is torchrun's to set") from None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
