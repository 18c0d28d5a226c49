"""The first instructions of a rank under torchrun: `python -m torch.distributed.run ... -m launcher.worker --config X`.

Whatever has to be done before torch is imported, which takes seconds: the rank ties its life to those who started it
and drops what would mislead it. Then `launcher/ranks/roles.py` goes on.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher import keeper
from ssd_runtime.host.cores import forget_binding, leave_binding

if TYPE_CHECKING:
    from ssd_runtime.host.topology import Role

STDIN = 0
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"


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
    role: Role | None,
    target: str | None,
    announce: str | None,
    trace: Path | None,
) -> None:
    """One rank; started by torchrun."""
    end_with_starters(os.environ)
    ignored = forget_binding(os.environ)
    if ignored and UNDER_TORCHRUN in os.environ:  # by hand: ours is started without them
        leave_binding()
    from launcher.ranks import roles  # brings torch
    from launcher.ranks.announcer import Announcer

    sys.exit(roles.run(config_path, overrides, role, target, Announcer.to(announce), trace, ignored))


def end_with_starters(environment: Mapping[str, str]) -> None:
    """Have the kernel end this rank with torchrun, and kill it with the keeper; at once if either is gone already.

    A torchrun that was started by hand has no keeper to see to a rank that does not listen: then the rank is killed.
    Nor does it say who it is, so if it died before this rank was here, that shows in a parent of another kind.
    """
    agent = environment.get(keeper.AGENT)
    if agent is not None:
        keeper.die_with(int(agent), signal.SIGTERM)
        keeper.die_with_the_writers_of(STDIN)
        return
    parent = os.getppid()
    keeper.die_with(parent, signal.SIGKILL)
    if UNDER_TORCHRUN in environment and not _runs_python(parent):
        sys.exit("torchrun is gone")


def _runs_python(pid: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe")
    except OSError:  # another user's, or none
        return False


if __name__ == "__main__":
    main()
