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

from launcher.commands.bench import bench_command
from launcher.commands.doctor import doctor
from launcher.commands.fetch import fetch
from launcher.commands.generate import generate
from launcher.commands.slurm import slurm
from launcher.commands.up import up
from launcher.study.command import study
from ssd_runtime import __version__, environment, logs
from ssd_runtime.bounds import shown
from ssd_runtime.cores import about_binding, forget_binding
from ssd_runtime.errors import ConfigError, InputOutputError, SsdError

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup, which means to go on
        signal.signal(signal.SIGHUP, _interrupt)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        with _input_and_output():
            _check_streams()
            logs.setup("launcher")
            environment.check(os.environ)
            _check_arguments(given)
            result = ssd.main(args=given, prog_name="ssd", standalone_mode=False)
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
        at_fault = _failing_streams() or ([f"{error.filename}"] if error.filename else [])
        where = f"{' and '.join(at_fault)}: " if at_fault else ""
        raise InputOutputError(f"{where}{error.strerror or error}") from error


def _failing_streams() -> list[str]:
    """Which of the standard streams cannot be written; what is left in their buffers goes nowhere from now on."""
    failing = []
    for stream, name in ((sys.stdout, "standard output"), (sys.stderr, "standard error")):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            failing.append(f"cannot write {name}")
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # also keeps the flush at exit quiet
    return failing


def _check_streams() -> None:
    """Make the standard streams fit for any text, and raise for a process that was started without an output.

    A closed descriptor would be given to the next file or socket that is opened, and be written to as standard output.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:  # the lowest free descriptor is taken first
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if 1 in closed:
        raise InputOutputError("standard output is closed: give it a file or a pipe, or /dev/null")
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 shows the rest


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


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
