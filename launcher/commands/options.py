"""Options that several commands have, under the same names and with the same help."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ssd_runtime.config import ConfigFile
from ssd_runtime.errors import ConfigError, InputOutputError

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


def check_writable(path: Path | None) -> None:
    """Raise ConfigError unless the file that an option names can be written; without a path, nothing."""
    if path is not None and not path.exists():
        check_replaceable(path)
    elif path is not None and not os.access(path, os.W_OK):
        raise ConfigError(f"cannot write {path}: it may not be written to")


def check_replaceable(path: Path | None) -> None:
    """The same for a file that is replaced by a new one when that is complete: a device or a pipe cannot be."""
    if path is not None and path.exists() and not path.is_file():
        raise ConfigError(f"cannot write {path}: it is no ordinary file")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write {path}: {path.parent} is not a directory one may write to")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file of the user's could not be written, as InputOutputError."""
    try:
        yield
    except OSError as error:
        raise InputOutputError(f"cannot write {path}: {error.strerror or error}") from None
