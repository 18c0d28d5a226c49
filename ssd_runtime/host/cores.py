"""CPU cores of one host: which a rank of each role runs on, and who has one already. Knows no ranks of a world."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ssd_runtime.config import Config, ModelConfig
from ssd_runtime.errors import ConfigError

Role = Literal["target", "draft"]
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # OpenMP reads them when it is loaded
CPUS = Path("/sys/devices/system/cpu")
STRIDE = 3  # so many numbers are shorter one by one
MOST_SHARERS = 64  # drafts of torchruns of their own on one core


@dataclass(frozen=True)
class Cores:
    """CPU cores of each role on one host; a role that is elsewhere, or on a GPU without named ones, has none."""

    target: tuple[int, ...] = ()
    draft: tuple[int, ...] = ()

    def of(self, role: Role) -> tuple[int, ...]:
        return self.target if role == "target" else self.draft


@functools.cache
def allowed_cores() -> tuple[int, ...]:
    """The cores this process might run on when first asked, in the order of `physical_first`: pinning does not change
    the answer."""
    return physical_first(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def physical_first(cores: Iterable[int], cpus: Path = CPUS) -> tuple[int, ...]:
    """Ascending, but a thread of each physical core before a second one of any: ranks that take some of them in a row
    compute on as many cores as they can, however the system numbers threads."""
    given = set(cores)

    def place(core: int) -> tuple[int, int]:
        try:
            siblings = _parsed((cpus / f"cpu{core}" / "topology" / "thread_siblings_list").read_text())
        except (OSError, ValueError):  # a system that does not tell
            siblings = set()
        return len([one for one in siblings & given if one < core]), core

    return tuple(sorted(given, key=place))


def forget_binding(environment: MutableMapping[str, str]) -> list[str]:
    """Remove what would have OpenMP bind threads to cores; returns it as NAME=value.

    Every process of a host would bind itself to the same cores, and could not leave them: these are set for programs
    that do not choose cores as ours do. It has to be done before torch, and with it OpenMP, is loaded.
    """
    return [f"{name}={environment.pop(name)}" for name in BINDING if name in environment]


def leave_binding() -> None:
    """Let this process run wherever the system allows it to: OpenMP has bound its parent, and so what that starts."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.sysconf("SC_NPROCESSORS_CONF")))  # the kernel leaves out what is not allowed


def about_binding(ignored: Iterable[str]) -> str:
    """What to say of it, in one line."""
    return f"ignored: {', '.join(ignored)}: ranks choose their cores themselves; target.cores and draft.cores name them"


def choose_cores(config: Config, allowed: Sequence[int], num_targets: int = 1, num_drafts: int = 1) -> Cores:
    """Cores of each role on one host: the targets' first, the drafts' beside them, as many as each rank has threads.

    Cores that the configuration names are taken as named and the others go around them. With too few cores for all,
    threads give way first, so that each rank has a core; then drafts share one, since the ranks of a target wait for
    each other in every layer; with a single core all share it. A role on a GPU gets none here unless they are named.
    The other role then takes the last cores, since the first are near the first GPU where there are several sockets,
    and leaves each rank on a GPU one.

    Args:
        config: threads, devices and named cores of each role.
        allowed: cores to choose from.
        num_targets: target ranks on this host, which divide the target's cores (`divide_cores`).
        num_drafts: drafts on this host, which divide the draft's.

    Raises:
        ConfigError: a named core is not allowed here.
    """
    ranks: dict[Role, int] = {"target": num_targets, "draft": num_drafts}
    models: dict[Role, ModelConfig] = {"target": config.target, "draft": config.draft}
    chosen: dict[Role, tuple[int, ...]] = {role: () for role, count in ranks.items() if not count}
    for role, model in models.items():
        if role in chosen:
            continue
        foreign = set(model.cores) - set(allowed)
        if foreign:
            raise ConfigError(
                f"config key '{role}.cores' names {listed(foreign)}, but this process may only use {listed(allowed)}"
            )
        if model.cores or model.device != "cpu":
            chosen[role] = tuple(model.cores)
    choosing = [role for role in models if role not in chosen]
    on_gpus = sum(ranks[role] for role, model in models.items() if model.device != "cpu" and not model.cores)
    for i, role in enumerate(choosing):
        taken = {core for cores in chosen.values() for core in cores}
        free = [core for core in allowed if core not in taken] or list(allowed[-1:])
        to_come = on_gpus + sum(ranks[later] for later in choosing[i + 1 :])
        wanted = min(models[role].threads * ranks[role], len(free) - to_come)
        least = min(ranks[role], len(free) - (to_come > 0))
        count = max(1, wanted, least)
        chosen[role] = tuple(free[:count] if config.target.device == config.draft.device else free[-count:])
    return Cores(chosen["target"], chosen["draft"])


def divide_near(near: Sequence[tuple[int, ...]], free: Sequence[int]) -> list[tuple[int, ...]]:
    """The cores of ranks on GPUs: those near to each, which ranks with the same ones divide.

    Where some would be left without or share, all divide `free`.

    Args:
        near: free cores near the GPU of each rank.
    """
    shares = [deal_out(mine, near[:i].count(mine), near.count(mine)) for i, mine in enumerate(near)]
    if all(shares) and len({core for mine in shares for core in mine}) == sum(map(len, shares)):
        return shares
    return [deal_out(free, i, len(near)) for i in range(len(near))]


def divide_cores(cores: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    """The cores of one of `count` ranks that divide `cores`; with fewer cores than ranks, one that others have too."""
    if len(cores) < count:
        return tuple(cores[index % len(cores) :][:1]) if cores else ()
    return tuple(cores[index * len(cores) // count : (index + 1) * len(cores) // count])


def deal_out(cores: Sequence[int], index: int, count: int) -> tuple[int, ...]:
    """As `divide_cores`, but in turns: of cores in the order of `physical_first` that mostly gives one rank both
    threads of a physical core."""
    return tuple(cores[index::count]) if len(cores) >= count else divide_cores(cores, index, count)


def crowding(cores: Mapping[str, Iterable[int]]) -> str | None:
    """What is wrong with where ranks run, in one line with the remedy; None if each has cores of its own.

    Args:
        cores: rank -> cores, as `topology.cores_by_role` names them; the first word of a rank is its role.
    """
    users: dict[int, list[str]] = {}
    for rank, numbers in cores.items():
        for core in numbers:
            users.setdefault(core, []).append(rank)
    crowds: dict[tuple[str, ...], list[int]] = {}
    for core, ranks in users.items():
        if len(ranks) > 1:
            crowds.setdefault(tuple(ranks), []).append(core)
    if not crowds:
        return None
    who = "; ".join(
        f"{', '.join(ranks[:-1])} and {ranks[-1]} share core{'s' if len(shared) > 1 else ''} {listed(shared)}"
        for ranks, shared in crowds.items()
    )
    roles = [{rank.split()[0] for rank in ranks} for ranks in crowds]
    if {"target", "draft"} in roles:
        why, remedy = "drafting cannot hide behind verification", "allow this process more cores"
    elif {"target"} in roles:
        why, remedy = "they wait for each other twice a layer", "lower target.tensor_parallel or name more target.cores"
    else:
        why, remedy = "they draft in turns", "lower deployment.drafts or allow this process more cores"
    return f"{who}: {why}; {remedy}"


def crowded(rank: int, cores: Iterable[int]) -> str:
    """What is wrong with a draft of a torchrun of its own that found all cores claimed, in one line."""
    return (
        f"draft {rank} shares core {listed(cores)} with other drafts of this host: they draft in turns; "
        "allow it more cores or start fewer drafts here"
    )


@dataclass
class Claims:
    """Cores that drafts of different torchruns keep apart by, for as long as their processes live.

    A claim is a bound address in Linux's abstract socket namespace: the kernel gives it up with its process, however
    that ends, so no claim is ever stale, and nobody else is asked. It holds for one network namespace.

    Attributes:
        crowded: the cores that were taken are others' too.
    """

    crowded: bool = False
    _held: list[socket.socket] = field(default_factory=list)

    def take(self, candidates: Sequence[int], count: int) -> tuple[int, ...]:
        """Up to `count` cores that nobody has claimed; if all are claimed, one of those with the fewest claims."""
        for sharers in range(MOST_SHARERS):
            taken: list[int] = []
            for core in candidates:
                if len(taken) < count and self._claim(core, sharers):
                    taken.append(core)
            if taken:
                self.crowded = sharers > 0
                return tuple(taken)
        return tuple(candidates[:count])

    def note(self, cores: Iterable[int]) -> None:
        """These are used whoever has claimed them: others are to go elsewhere if they can."""
        for core in cores:
            self._claim(core, 0)

    def _claim(self, core: int, sharers: int) -> bool:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0ssd-draft/core-{core}/{sharers}")
        except OSError:
            claim.close()
            return False
        self._held.append(claim)
        return True

    def release(self) -> None:
        """Before the process ends."""
        while self._held:
            self._held.pop().close()


def pin(cores: Iterable[int], threads: int) -> None:
    """Keep this process, all its threads of now and later, on `cores`, computing with `threads` threads.

    No cores means no pinning.
    """
    import torch  # here and not above, for the reason given in topology.py

    wanted = set(cores)
    if wanted and hasattr(os, "sched_setaffinity"):
        for thread in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.sched_setaffinity(int(thread), wanted)
    torch.set_num_threads(min(threads, len(wanted)) if wanted else threads)


def listed(cores: Iterable[int]) -> str:
    """0,1,2,3,8 as "0-3,8", and 0,4,8,12 as "0-12:4", as taskset reads it."""
    left, parts = sorted(set(cores)), []
    while left:
        step = left[1] - left[0] if len(left) > 1 else 1
        run = 1
        while run < len(left) and left[run] == left[0] + run * step:
            run += 1
        if (step > 1 and run <= STRIDE) or run == 1:
            run = 1
            parts.append(f"{left[0]}")
        else:
            parts.append(f"{left[0]}-{left[run - 1]}" + f":{step}" * (step > 1))
        left = left[run:]
    return ",".join(parts)


def _parsed(text: str) -> set[int]:
    """The cores of a list as the kernel writes it, "0-3,8"."""
    runs = [part.split("-") for part in text.strip().split(",")]
    return {core for run in runs for core in range(int(run[0]), int(run[-1]) + 1)}
