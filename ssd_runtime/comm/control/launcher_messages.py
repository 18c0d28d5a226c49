"""What the ranks tell the launcher that started them: how they come up, and why they end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from ssd_runtime.comm.protocol import CoreNumbers, CoresByRole, Name, Rank, Reason
from ssd_runtime.host.cores import Role


@dataclass(frozen=True)
class Progress:
    """Worker -> launcher: a phase that takes long (0 to 1)."""

    role: Role
    rank: Rank
    phase: Annotated[str, Meta(max_length=256)]
    fraction: Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True)
class Ready:
    """Leader -> launcher: requests are taken at `address`.

    Attributes:
        key: a secret of this engine, to be repeated in `Shutdown`.
    """

    address: Annotated[str, Meta(max_length=512)]
    cores: CoresByRole
    key: Name = ""


@dataclass(frozen=True)
class Joined:
    """Draft of a torchrun of its own -> launcher: linked, and known to the target by this number.

    Attributes:
        cores: it is pinned to.
        crowded: other drafts of its host are on these cores too.
    """

    rank: Rank
    cores: CoreNumbers
    crowded: bool = False


@dataclass(frozen=True)
class WorkerFailed:
    """Worker -> launcher, last: "config" is the user's to mend (exit code 2), "runtime" is not (exit code 1)."""

    role: Role
    rank: Rank
    kind: Literal["config", "runtime"]
    reason: Reason
