"""The entry point of a rank under torchrun: `python -m torch.distributed.run ... -m launcher.worker --config X`.

Finds the rank's role, runs it, and says what went wrong in one line. Rank 0 leads, the other ranks of a
tensor-parallel target follow it, and the ranks after them draft.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

import click

from launcher import nccl, processes
from launcher.announcer import Announcer
from launcher.draft_rank import DraftRank
from launcher.follower_rank import FollowerRank
from launcher.rank import Surroundings
from launcher.target_rank import TargetRank
from ssd_runtime import logs, topology
from ssd_runtime.comm.messages_launcher import WorkerFailed
from ssd_runtime.config import load_config
from ssd_runtime.cores import crowding
from ssd_runtime.errors import ConfigError, SsdError

log = logging.getLogger("ssd.worker")


@click.command()
@click.option("--config", "config_path", type=click.Path(path_type=Path))
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE")
@click.option("--role", type=click.Choice(["target", "draft"]), help="Of all ranks of this torchrun; default: both.")
@click.option("--target", metavar="HOST:PORT", help="The leader's address, with --role draft.")
@click.option("--announce", metavar="ADDRESS", help="Where the launcher listens.")
@click.option("--trace", type=click.Path(path_type=Path))
def main(
    config_path: Path | None,
    overrides: tuple[str, ...],
    role: topology.Role | None,
    target: str | None,
    announce: str | None,
    trace: Path | None,
) -> None:
    """One rank; started by torchrun."""
    processes.die_with(os.getppid())
    sys.exit(run(config_path, overrides, role, target, Announcer(announce), trace))


def run(
    config_path: Path | None,
    overrides: tuple[str, ...],
    group_role: topology.Role | None,
    target: str | None,
    announcer: Announcer,
    trace: Path | None,
) -> int:
    """Run one rank to its end; returns the exit code. What went wrong is announced and logged as one line."""
    rank = os.environ.get("RANK", "0")
    role: Any = group_role or ("target" if rank == "0" else "draft")
    try:
        logs.setup(role, None if group_role == "draft" else int(rank))  # such a draft gets its number from the target
        config = load_config(config_path, overrides)
        if "cuda" in (config.target.device, config.draft.device):
            for setting in nccl.apply():
                log.info("%s=%s: %s", setting.name, setting.value, setting.reason)
        group = topology.group_of(group_role, target)
        place = topology.place(config, os.environ, group)
        if place.role != role:
            role = place.role
            logs.setup(role, int(rank))
        if place.rank == place.here.start and (group is None or role == "target"):  # one for the host
            crowd = crowding(topology.cores_by_role(config, place.world_size, place.here))
            if crowd is not None:
                log.warning("%s", crowd)
        leads = place.rank == 0
        kind = DraftRank if role == "draft" else TargetRank if leads else FollowerRank
        kind(Surroundings(config, place, announcer, trace)).run()
    except SsdError as error:
        code = 2 if isinstance(error, ConfigError) else 1
        log.error("%s", error, exc_info=log.isEnabledFor(logging.DEBUG))
        announcer.say(WorkerFailed(role, int(rank), "config" if code == 2 else "runtime", str(error)))
        return code
    except Exception as error:  # the last resort: the log has the traceback, the user a line
        log.exception("this is a bug")
        announcer.say(WorkerFailed(role, int(rank), "runtime", f"{role} rank {rank}: {type(error).__name__}: {error}"))
        return 1
    finally:
        announcer.close()
    return 0


if __name__ == "__main__":
    main()
