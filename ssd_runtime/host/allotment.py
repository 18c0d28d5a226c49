"""What each rank of one host gets: its GPU and its CPU cores. Arithmetic over roles; asks no driver, moves nobody.

So every rank finds its own place alone, and whoever plans finds the same. A rank on a GPU gets CPU cores too: its
process launches kernels and carries the link, and would lose its turns to a draft that computes on the same core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.errors import ConfigError
from ssd_runtime.host.cores import Role, listed
from ssd_runtime.host.hardware import Hardware


def model_of(config: Config, role: Role) -> ModelConfig:
    """The section of a role."""
    return config.target if role == "target" else config.draft


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
        roles: as for `gpus_of`.
        allowed: cores of this host, the best first.
        hardware: its GPUs.

    Raises:
        ConfigError: a named core is not allowed.
    """
    guests = _guests(config, roles)
    named = config.draft.cores if guests else ()  # guests go there; whether they may is for them to find out
    everyone = list(roles)
    everyone += ["draft"] * (0 if named else guests)
    chosen = choose_cores(config, allowed, everyone.count("target"), everyone.count("draft"))
    cores = [part for role, mine in chosen.items() for part in in_blocks(mine, everyone.count(role))]
    taken = {*named, *itertools.chain(*chosen.values())}
    free = [core for core in allowed if core not in taken]
    on_gpus = {i: gpu for i, gpu in enumerate(gpus_of(config, everyone)) if gpu is not None and not cores[i]}
    near = [near_cores(hardware, gpu, free) for gpu in on_gpus.values()]
    if any(near) or len(free) < len(allowed):
        for i, mine in zip(on_gpus, divide_near(near, free or allowed), strict=True):
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
    roles: list[Role] = ["target"] * targets_here
    cores = cores_of(config, [*roles, "draft"], allowed, hardware)
    targets, drafts = (list(itertools.chain(*part)) for part in (cores[:targets_here], cores[targets_here:]))
    if config.draft.device == "cpu" and not config.draft.cores:
        drafts += [core for core in allowed if core not in {*targets, *drafts}]
    return tuple(drafts)


def choose_cores(
    config: Config, allowed: Sequence[int], num_targets: int = 1, num_drafts: int = 1
) -> dict[Role, tuple[int, ...]]:
    """Cores of each role on one host: the targets' first, the drafts' beside them, as many as each rank has threads.

    Cores that the configuration names are taken as named and the others go around them. With too few cores for all,
    threads give way first, so that each rank has a core; then drafts share one, since the ranks of a target wait for
    each other in every layer; with a single core all share it. A role on a GPU gets none here unless they are named.
    The other role then takes the last cores, since the first are near the first GPU where there are several sockets,
    and leaves each rank on a GPU one.

    Args:
        allowed: as for `cores_of`.
        num_targets, num_drafts: ranks on this host, which divide their role's cores.

    Raises:
        ConfigError: a named core is not allowed here.
    """
    ranks: dict[Role, int] = {"target": num_targets, "draft": num_drafts}
    chosen: dict[Role, tuple[int, ...]] = {"target": (), "draft": ()}
    for role in (role for role in ranks if ranks[role]):
        chosen[role] = model_of(config, role).cores
        if foreign := set(chosen[role]) - set(allowed):
            raise ConfigError(
                f"config key '{role}.cores' names {listed(foreign)}, but this process may only use {listed(allowed)}"
            )
    without = {role: count for role, count in ranks.items() if not chosen[role]}
    from_the_end = config.target.device != config.draft.device
    for role in [role for role, count in without.items() if count and model_of(config, role).device == "cpu"]:
        count = without.pop(role)
        taken = {*chosen["target"], *chosen["draft"]}
        free = [core for core in allowed if core not in taken] or list(allowed[-1:])
        to_come = sum(without.values())
        wanted = min(model_of(config, role).threads * count, len(free) - to_come)
        most = max(1, wanted, min(count, len(free) - (to_come > 0)))
        chosen[role] = tuple(free[-most:] if from_the_end else free[:most])
    return chosen


def near_cores(hardware: Hardware, index: int, allowed: Sequence[int]) -> tuple[int, ...]:
    """The allowed cores for the process of one GPU: those near it, divided with the other GPUs they are near to.

    All of them where there are fewer cores than GPUs; none where NVML does not know.
    """
    if not 0 <= index < len(hardware.gpus):
        return ()
    near = hardware.gpus[index].cores
    usable = [core for core in allowed if core in set(near)]
    sharing = [i for i, gpu in enumerate(hardware.gpus) if gpu.cores == near]
    each = len(usable) // len(sharing)
    return in_turns(usable, len(sharing))[sharing.index(index)][:each] if each else tuple(usable)


def divide_near(near: Sequence[tuple[int, ...]], free: Sequence[int]) -> list[tuple[int, ...]]:
    """The cores of ranks on GPUs: those near to each, which ranks with the same ones divide.

    Where some would be left without or share, all divide `free`.

    Args:
        near: free cores near the GPU of each rank.
    """
    parts = [in_turns(mine, near.count(mine))[near[:i].count(mine)] for i, mine in enumerate(near)]
    if all(parts) and sum(map(len, parts)) == len(set().union(*parts)):
        return parts
    return in_turns(free, len(near))


def in_blocks(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The cores of each of `count` ranks that divide `cores`; with fewer cores than ranks, one that others have too."""
    if len(cores) < count:
        return [tuple(cores[index % len(cores) :][:1]) if cores else () for index in range(count)]
    return [tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count]) for index in range(count)]


def in_turns(cores: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """As `in_blocks`, but dealt out one by one: of cores in the order of `physical_first` that mostly gives one rank
    both threads of a physical core."""
    return [tuple(cores[i::count]) for i in range(count)] if len(cores) >= count else in_blocks(cores, count)


def _guests(config: Config, roles: Sequence[Role]) -> int:
    """Drafts of other torchruns that a target on a GPU keeps cores for: it needs few, and cannot make room later."""
    beside = config.draft.device == "cpu" or config.deployment.share_gpu
    if config.target.device == "cpu" or not beside or "target" not in roles:
        return 0
    drafts = config.deployment.drafts if config.speculation.mode in ("sd", "ssd") else 0
    return max(0, drafts - roles.count("draft"))
