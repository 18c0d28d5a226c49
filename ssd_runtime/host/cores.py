"""The CPU cores of this host: which there are, who has one already, how a process keeps to its own. Who is to have
which is allotment.py's."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Role = Literal["target", "draft"]
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")  # OpenMP reads them when it is loaded
CPUS = Path("/sys/devices/system/cpu")
STRIDE = 3  # so many numbers are shorter one by one
MOST_SHARERS = 64  # drafts of torchruns of their own on one core


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
            text = (cpus / f"cpu{core}" / "topology" / "thread_siblings_list").read_text()
            runs = [part.split("-") for part in text.strip().split(",")]  # as the kernel writes it, "0-3,8"
            siblings = {one for run in runs for one in range(int(run[0]), int(run[-1]) + 1)}
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


def crowding(cores: Mapping[str, Collection[int]]) -> str | None:
    """What is wrong with where ranks run, in one line with the remedy; None if each has cores of its own.

    Args:
        cores: rank -> cores, as `topology.cores_by_role` names them; the first word of a rank is its role.
    """
    crowds: dict[tuple[str, ...], list[int]] = {}
    for core in dict.fromkeys(itertools.chain(*cores.values())):
        ranks = tuple(rank for rank, numbers in cores.items() if core in numbers)
        if len(ranks) > 1:
            crowds.setdefault(ranks, []).append(core)
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
            free = (core for core in candidates if self._claim(core, sharers))
            if taken := tuple(itertools.islice(free, count)):
                self.crowded = sharers > 0
                return taken
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
        first, step = left[0], left[1] - left[0] if len(left) > 1 else 1
        run = next((i for i, core in enumerate(left) if core != first + i * step), len(left))
        if run == 1 or (step > 1 and run <= STRIDE):
            run = 1
            parts.append(f"{first}")
        else:
            parts.append(f"{first}-{left[run - 1]}" + f":{step}" * (step > 1))
        left = left[run:]
    return ",".join(parts)
