"""One rank from its role to its exit code, and what went wrong in one line. Knows nothing of who started it.

Rank 0 leads, the other ranks of a tensor-parallel target follow it, and the ranks after them draft.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.ranks import nccl
from launcher.ranks.announcer import Announcer
from launcher.ranks.draft_rank import DraftRank
from launcher.ranks.follower_rank import FollowerRank
from launcher.ranks.target_rank import TargetRank
from ssd_runtime import environment, logs
from ssd_runtime.comm.control.launcher_messages import WorkerFailed
from ssd_runtime.config import load_config
from ssd_runtime.errors import ConfigError, SsdError
from ssd_runtime.host import topology
from ssd_runtime.host.cores import about_binding, crowding

log = logging.getLogger("ssd.worker")


def run(
    config_path: Path | None,
    overrides: tuple[str, ...],
    group_role: topology.Role | None,
    target: str | None,
    announcer: Announcer,
    trace: Path | None,
    ignored: Sequence[str] = (),
) -> int:
    """Run one rank to its end; returns the exit code. What went wrong is announced and logged as one line.

    Args:
        ignored: variables of the environment, as `cores.forget_binding` returns them.
    """
    told = os.environ.get("RANK", "0")
    rank = int(told) if told.isdecimal() else 0  # topology.place says what is wrong with it
    role: Any = group_role or ("target" if rank == 0 else "draft")
    try:
        logs.setup(role, None if group_role == "draft" else rank)  # such a draft gets its number from the target
        environment.check(os.environ)
        if ignored:
            log.warning("%s", about_binding(ignored))
        config = load_config(config_path, overrides)
        if "cuda" in (config.target.device, config.draft.device):
            for setting in nccl.apply():
                log.info("%s=%s: %s", setting.name, setting.value, setting.reason)
        group = topology.group_of(group_role, target)
        place = topology.place(config, os.environ, group)
        if place.role != role:
            role = place.role
            logs.setup(role, rank)
        if place.rank == place.here.start and (group is None or role == "target"):  # one for the host
            crowd = crowding(topology.cores_by_role(config, place.world_size, place.here))
            if crowd is not None:
                log.warning("%s", crowd)
        leads = place.rank == 0
        kind = DraftRank if role == "draft" else TargetRank if leads else FollowerRank
        kind(config, place, announcer, trace).run()
    except SsdError as error:
        code = 2 if isinstance(error, ConfigError) else 1
        log.error("%s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        announcer.say(WorkerFailed(role, rank, "config" if code == 2 else "runtime", str(error)))
        return code
    except Exception as error:  # the last resort: the log has the traceback, the user a line
        log.exception("this is a bug")
        announcer.say(WorkerFailed(role, rank, "runtime", f"{role} rank {rank}: {type(error).__name__}: {error}"))
        return 1
    finally:
        announcer.close()
    return 0
