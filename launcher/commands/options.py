"""Options that several commands have, under the same names and with the same help."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ssd_runtime.errors import ConfigError


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


config_options = _together(
    click.option(
        "--config", "config_path", type=click.Path(path_type=Path), help="TOML file; the defaults without it."
    ),
    click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one configuration key."
    ),
)
connect_option = click.option("--connect", metavar="ADDRESS", help="Use the engine that runs there (see ssd up).")
trace_option = click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a Perfetto/Chrome trace of both roles."
)


def check_writable(path: Path | None) -> None:
    """Raise ConfigError unless the file that an option names can be written; without a path, nothing."""
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: {path.parent} is not a directory one may write to")
