"""What each rank of one host gets: its GPU and its CPU cores. Arithmetic over roles; asks no driver, moves nobody.

So every rank finds its own place alone, and whoever plans finds the same. A rank on a GPU gets CPU cores too: its
process launches kernels and carries the link, and would lose its turns to a draft that computes on the same core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.host.cores import Role, choose_cores, divide_cores, divide_near
from ssd_runtime.host.hardware import Hardware, near_cores


def model_of(config: Config, role: Role) -> ModelConfig:
    """The section of a role."""
    return config.target if role == "target" else config.draft


def roles_in_order(num_targets: int, num_drafts: int) -> list[Role]:
    """The roles of the ranks of a torchrun: targets come first."""
    targets: list[Role] = ["target"] * num_targets
    drafts: list[Role] = ["draft"] * num_drafts
    return targets + drafts


def gpus_of(config: Config, roles: Sequence[Role]) -> list[int | None]:
    """The GPU of each rank of one host, by its number there; None for a rank on a CPU.

    Ranks on GPUs take one each, in order; ranks on CPUs do not count. With `deployment.share_gpu` the drafts take those
    of the target's ranks in turn, where there are any on this host.

    Args:
        roles: of the ranks of one torchrun on this host, targets first.
    """
    own, targets = itertools.count(), roles.count("target")
    shared = itertools.cycle(range(targets)) if config.deployment.share_gpu and targets else own
    return [
        None if model_of(config, role).device == "cpu" else next(shared if role == "draft" else own) for role in roles
    ]


def lacks_gpus(config: Config, roles: Sequence[Role], device_count: int) -> str | None:
    """Why one host cannot run these ranks, in one line with the remedy; None if it has GPUs enough.

    Args:
        roles: as for `gpus_of`.
        device_count: GPUs of this host.
    """
    wanted = len({gpu for gpu in gpus_of(config, roles) if gpu is not None})
    if wanted <= device_count:
        return None
    counts: dict[Role, int] = {
        role: roles.count(role) for role in ("target", "draft") if model_of(config, role).device == "cuda"
    }
    num_targets, num_drafts = counts.get("target", 0), counts.get("draft", 0)
    if num_targets > device_count:
        remedy = "lower target.tensor_parallel or give the target more nodes"
    else:
        remedies = ["lower deployment.drafts"] * (num_drafts > 1)
        remedies += ["set deployment.share_gpu = true (drafts on the target's GPUs)"] * (num_targets > 0)
        remedy = " or ".join([*remedies, 'set draft.device = "cpu"'])
    who = " and ".join(f"{count} {role}{'s' * (count > 1)}" for role, count in counts.items() if count)
    return f"{who} want {wanted} GPUs of one host, and it has {device_count}: {remedy}"


def cores_of(
    config: Config, roles: Sequence[Role], allowed: Sequence[int], hardware: Hardware
) -> list[tuple[int, ...]]:
    """The cores of each rank of one host, then of the drafts that may come to it from torchruns of their own.

    A rank on a GPU gets the cores near it, as far as NVML knows them, that ranks on CPUs leave. It is not pinned where
    nothing is known and nobody in the way.

    Args:
        roles: of the ranks of one torchrun on this host, targets first.
        allowed: cores of this host.
        hardware: its GPUs.

    Raises:
        ConfigError: a named core is not allowed.
    """
    guests = _guests(config, roles)
    num_targets = roles.count("target")
    num_drafts = roles.count("draft") + (0 if config.draft.cores else guests)
    chosen = choose_cores(config, allowed, num_targets, num_drafts)
    cores = [divide_cores(chosen.target, i, num_targets) for i in range(num_targets)]
    cores += [divide_cores(chosen.draft, i, num_drafts) for i in range(num_drafts)]
    taken = {*chosen.target, *chosen.draft, *(config.draft.cores if guests else ())}
    free = [core for core in allowed if core not in taken]
    gpus = {
        i: gpu
        for i, gpu in enumerate(gpus_of(config, roles_in_order(num_targets, num_drafts)))
        if gpu is not None and not cores[i]
    }
    near = [near_cores(hardware, gpu, free) for gpu in gpus.values()]
    if any(near) or len(free) < len(allowed):
        for i, mine in zip(gpus, divide_near(near, free or allowed), strict=True):
            cores[i] = mine
    return cores


def cores_beside(config: Config, targets_here: int, allowed: Sequence[int], hardware: Hardware) -> tuple[int, ...]:
    """Where a draft of a torchrun of its own may go on a host that runs so many ranks of its target: not to theirs.

    Args:
        allowed, hardware: as for `cores_of`.

    Returns:
        Those to choose from, the best first, on a CPU without named cores; else those to be pinned to.
    """
    if config.target.device == config.draft.device == "cuda" and not config.deployment.share_gpu:
        targets_here = 0  # near GPUs that are hidden from this draft
    cores = cores_of(config, roles_in_order(targets_here, 1), allowed, hardware)
    targets = {core for one in cores[:targets_here] for core in one}
    drafts = [core for one in cores[targets_here:] for core in one]
    if config.draft.device == "cpu" and not config.draft.cores:
        drafts += [core for core in allowed if core not in {*targets, *drafts}]
    return tuple(drafts)


def _guests(config: Config, roles: Sequence[Role]) -> int:
    """Drafts of other torchruns that a target on a GPU keeps cores for: it needs few, and cannot make room later."""
    beside = config.draft.device == "cpu" or config.deployment.share_gpu
    if config.target.device == "cpu" or not beside or "target" not in roles:
        return 0
    drafts = config.deployment.drafts if config.speculation.mode in ("sd", "ssd") else 0
    return max(0, drafts - roles.count("draft"))
