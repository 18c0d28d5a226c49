"""`ssd fetch`: embedded models, brought into the cache."""

from __future__ import annotations

import click

from launcher.commands.options import config_options
from ssd_runtime.config import ConfigFile, load_config


@click.command()
@click.argument("names", nargs=-1)
@config_options
def fetch(names: tuple[str, ...], config_file: ConfigFile | None, overrides: tuple[str, ...]) -> None:
    """Bring embedded models into the cache: NAMES, or those the configuration uses."""
    from launcher import screen
    from ssd_runtime.model.files.catalogue import CATALOGUE, resolve
    from ssd_runtime.model.files.fetch import fetch as fetch_model

    config = load_config(config_file, overrides)
    for name in names or dict.fromkeys([config.target.model, config.draft.model]):
        if not names and name not in CATALOGUE:
            click.echo(f"{name}: {resolve(name)}")  # the user's own file: there, or an error
            continue
        with screen.fetching(f"fetch {name}") as progress:
            path = fetch_model(name, progress)
        click.echo(f"{name}: {path}")
