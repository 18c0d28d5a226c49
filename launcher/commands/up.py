"""`ssd up`: an engine, or this node's part of one, that runs until it is told to end."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.commands import engine
from launcher.commands.options import MOST_NODES, MOST_RANKS, config_options, trace_option
from launcher.files import check_replaceable
from launcher.nodes import Nodes
from ssd_runtime.config import ConfigFile, load_config

if TYPE_CHECKING:
    from launcher.torchrun import Launch
    from ssd_runtime.host.topology import Role

log = logging.getLogger(__name__)

UP_POLL_S = 0.5


@click.command()
@config_options
@trace_option
@click.option("--nnodes", type=click.IntRange(1, MOST_NODES), default=1, show_default=True, help="Nodes of the world.")
@click.option("--node-rank", type=click.IntRange(min=0), default=0, show_default=True, help="Of this node; 0 leads.")
@click.option("--rendezvous", metavar="HOST:PORT", help="Of node 0, the same on all nodes.")
@click.option(
    "--nproc-per-node",
    type=click.IntRange(1, MOST_RANKS),
    help="Ranks on this node; default: the target's together on the first.",
)
@click.option("--role", type=click.Choice(["target", "draft"]), help="Start only these ranks: both may fail apart.")
@click.option("--target", metavar="HOST:PORT", help="With --role draft: the address that the target prints.")
def up(
    config_file: ConfigFile | None,
    overrides: tuple[str, ...],
    trace: Path | None,
    nnodes: int,
    node_rank: int,
    rendezvous: str | None,
    nproc_per_node: int | None,
    role: Role | None,
    target: str | None,
) -> None:
    """Keep an engine running for `ssd generate --connect` until Ctrl-C or SIGTERM.

    On several nodes, run it on each with the same --nnodes and --rendezvous. To let target and draft fail apart, run
    it once with --role target and once, or for several drafts as often as deployment.drafts says, with --role draft
    --target HOST:PORT; a draft may come, go and come back.
    """
    from launcher.torchrun import Launch
    from ssd_runtime.host.topology import group_of

    group = group_of(role, target)
    nodes = Nodes(nnodes, node_rank, rendezvous, nproc_per_node or 0)
    config = load_config(config_file, overrides)
    config = load_config(config_file, (*overrides, *nodes.overrides(config)))
    try:
        if not nodes.leads or role == "draft":
            _stay(Launch(config, trace=trace, nodes=nodes, group=group))
            return
        with engine.open_session(config, None, trace, None, nodes, group) as session:
            from launcher import screen

            if session.label:
                click.echo(session.label)
            click.echo(f"address: {session.address}")
            click.echo(f"cores: {screen.cores_line(session.cores)}")
            click.echo(f"use it: ssd generate --connect {session.address} --prompt 'Hello'  (Ctrl-C ends it)")
            assert session.ranks is not None, "up starts its own ranks"
            while session.ranks.is_running():
                time.sleep(UP_POLL_S)
            session.ranks.raise_unless_ended_well()
    except KeyboardInterrupt:
        click.echo("engine stopped", err=True)


def _stay(launch: Launch) -> None:
    """Ranks that are led from elsewhere: another node of their world, or the target of a draft's group."""
    from launcher import preflight

    nodes, group = launch.nodes, launch.group
    check_replaceable(launch.trace)
    preflight.check_engine(launch.config, nodes, group)
    from launcher import screen, session
    from ssd_runtime.host.cores import crowded

    with session.joined(launch) as ranks:
        if group is not None and group.target is not None:
            click.echo(f"drafts for: {group.target}  (Ctrl-C ends it; the target goes on without)")
        else:
            click.echo(f"node {nodes.rank} of {nodes.count}: ranks started; node 0 says when the engine is ready")
        while ranks.is_running():
            for draft in ranks.joined():
                click.echo(f"linked: {screen.cores_line({f'draft {draft.rank}': draft.cores})}")
                if draft.crowded:
                    log.warning("%s", crowded(draft.rank, draft.cores))
            time.sleep(UP_POLL_S)
        ranks.raise_unless_ended_well()
