"""Options that several commands have, under the same names and with the same help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ssd_runtime.config import ConfigFile

MOST_NODES, MOST_RANKS = 1024, 512  # of a world; on a node


class ConfigParameter(click.ParamType):
    """A configuration file, read at once and once: it may be a pipe."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> ConfigFile:
        return value if isinstance(value, ConfigFile) else ConfigFile.read(value)


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return apply


config_options = _together(
    click.option("--config", "config_file", type=ConfigParameter(), help="TOML file or pipe; the defaults without it."),
    click.option(
        "--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Override one configuration key."
    ),
)
connect_option = click.option("--connect", metavar="ADDRESS", help="Use the engine that runs there (see ssd up).")
trace_option = click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), help="Write a Perfetto/Chrome trace of both roles."
)
