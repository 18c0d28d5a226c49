"""The command line `ssd`: its commands (commands/, study/), one line for every error, and an exit code.

Exit codes: 0 done, 1 something broke, 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

import click

from launcher.commands.bench import bench_command
from launcher.commands.doctor import doctor
from launcher.commands.fetch import fetch
from launcher.commands.generate import generate
from launcher.commands.slurm import slurm
from launcher.commands.up import up
from launcher.study.command import study
from ssd_runtime import __version__, logs
from ssd_runtime.cores import about_binding, forget_binding
from ssd_runtime.errors import SsdError

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; returns the exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as under nohup, which means to go on
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        logs.setup("launcher")
        result = ssd.main(args=arguments, prog_name="ssd", standalone_mode=False)
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
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: keep the flush at exit quiet
        return 1
    except Exception as error:  # the last resort: a traceback is not for users
        log.debug("traceback", exc_info=True)
        remedy = "this is a bug; SSD_LOG=debug shows the traceback"
        return _fail(f"unexpected {type(error).__name__}: {error} ({remedy})", 1)


def _fail(message: str, code: int) -> int:
    click.echo(f"ssd: error: {' '.join(message.split())}", err=True)
    return code


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ssd")
def ssd() -> None:
    """Speculative speculative decoding: the draft prepares the next speculation while the target verifies this one."""
    if ignored := forget_binding(os.environ):  # before a command imports torch: what it starts would be bound with it
        log.warning("%s", about_binding(ignored))


for command in (generate, bench_command, up, doctor, fetch, slurm, study):
    ssd.add_command(command)


if __name__ == "__main__":
    sys.exit(main())
