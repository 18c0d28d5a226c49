"""`ssd doctor`: whether this machine can run a configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from launcher.commands.options import MOST_NODES, config_options
from launcher.nodes import seats_of
from ssd_runtime.config import ConfigFile, load_config

if TYPE_CHECKING:
    from ssd_runtime.host.cores import Role


@click.command()
@config_options
@click.option("--nnodes", type=click.IntRange(1, MOST_NODES), default=1, show_default=True, help="Nodes like this one.")
@click.option("--nproc-per-node", metavar="N[,N...]", help="Ranks on each; default: the target's together, in front.")
@click.option("--role", type=click.Choice(["target", "draft"]), help="Only these ranks, as with ssd up --role.")
def doctor(
    config_file: ConfigFile | None,
    overrides: tuple[str, ...],
    nnodes: int,
    nproc_per_node: str | None,
    role: Role | None,
) -> int:
    """Say whether this machine can run the configuration, or so many nodes like it, and print which rank goes where."""
    config = load_config(config_file, overrides)
    from launcher import doctor as physician  # with the libraries of model files: after what can be told without
    from launcher import screen

    findings = list(physician.examine(config, seats_of(config, nnodes, nproc_per_node, role)))
    screen.console().print(screen.findings_table(findings))
    failed = [finding.subject for finding in findings if not finding.ok]
    click.echo(f"FAIL: {', '.join(failed)}" if failed else "OK: this configuration can run here")
    return 1 if failed else 0
