"""The command line `ssd`: its commands (commands/, study/), one line for every error, and an exit code.

Exit codes: 0 done, 1 something broke, 2 something the user can mend, 74 something could not be read or written, 75 try
again later, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import click

from launcher import streams
from launcher.commands.bench import bench_command
from launcher.commands.doctor import doctor
from launcher.commands.fetch import fetch
from launcher.commands.generate import generate
from launcher.commands.slurm import slurm
from launcher.commands.study import study
from launcher.commands.up import up
from ssd_runtime import __version__, environment, logs
from ssd_runtime.errors import ConfigError, InputOutputError, SsdError
from ssd_runtime.host.cores import about_binding, forget_binding
from ssd_runtime.typed import shown

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup, which means to go on
        signal.signal(signal.SIGHUP, _interrupt)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with _input_and_output():
            streams.prepare()
            logs.setup("launcher")
            environment.check(os.environ)
            _check_arguments(given)
            result = ssd.main(args=given, prog_name="ssd", standalone_mode=False, obj=given)  # commands may say it
            sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", 130)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        return _fail(error.format_message(), 2)
    except SsdError as error:
        log.debug("traceback", exc_info=True)
        return _fail(str(error), error.exit_code)
    except MemoryError:
        return _fail("out of memory", 1)
    except Exception as error:  # the last resort: a traceback is not for users
        log.debug("traceback", exc_info=True)
        remedy = "this is a bug; SSD_LOG=debug shows the traceback"
        return _fail(f"unexpected {type(error).__name__}: {error} ({remedy})", 1)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # nobody hears it; the exit code still says it
        click.echo(f"ssd: error: {' '.join(message.split())}", err=True)
    return code


@contextlib.contextmanager
def _input_and_output() -> Iterator[None]:
    """The one place where what the system refuses to read or write becomes a line: InputOutputError."""
    try:
        yield
    except OSError as error:
        where = "" if error.filename is None else f"{error.filename}: "
        raise InputOutputError(f"{where}{error.strerror or error}") from error


def _check_arguments(arguments: Sequence[str]) -> None:
    """Raise ConfigError for arguments that fit into no message, file or script, and for a directory that is gone."""
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise ConfigError(f"argument {shown(argument)} is not UTF-8") from None
    try:
        os.getcwd()
    except OSError:
        raise ConfigError("the working directory is gone: cd to one that is there") from None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


class _Commands(click.Group):
    """Left to itself, click ends in silence where nobody reads its output."""

    def make_context(self, *arguments: Any, **settings: Any) -> click.Context:
        with _input_and_output():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: click.Context) -> Any:
        with _input_and_output():
            return super().invoke(ctx)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ssd")
def ssd() -> None:
    """Speculative speculative decoding: the draft prepares the next speculation while the target verifies this one."""
    if ignored := forget_binding(os.environ):  # before a command imports torch: what it starts would be bound with it
        log.warning("%s", about_binding(ignored))


for command in (generate, bench_command, up, doctor, fetch, slurm, study):
    ssd.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
