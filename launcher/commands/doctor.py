"""`ssd doctor`: whether this machine can run a configuration."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.commands.options import config_options
from ssd_runtime.config import load_config


@click.command()
@config_options
def doctor(config_path: Path | None, overrides: tuple[str, ...]) -> int:
    """Say whether this machine can run the configuration."""
    from launcher import doctor as physician
    from launcher import screen

    findings = list(physician.examine(load_config(config_path, overrides)))
    screen.console().print(screen.findings_table(findings))
    failed = [finding.subject for finding in findings if not finding.ok]
    click.echo(f"FAIL: {', '.join(failed)}" if failed else "OK: this configuration can run here")
    return 1 if failed else 0
