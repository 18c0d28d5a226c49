"""How log lines of one process look: `12:34:56.789 target 0 | loaded in 1.2 s` on stderr. Knows nobody who logs.

The level comes from the environment variable SSD_LOG (debug, info, warning or error; warning if it is not set).
"""

from __future__ import annotations

import logging
import os
import sys

from ssd_runtime.errors import ConfigError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def setup(role: str, rank: int | None = None) -> None:
    """Give this process its one handler. Later calls replace it, so a test or a restarted role may call again.

    Args:
        role: first word of a line: "target", "draft", "launcher".
        rank: global rank; None for a process that has none.

    Raises:
        ConfigError: SSD_LOG names no level.
    """
    name = os.environ.get("SSD_LOG", "warning").strip().lower()
    if name not in LEVELS:
        raise ConfigError(f"SSD_LOG={name!r} is not a log level; use one of {', '.join(LEVELS)}")
    who = role if rank is None else f"{role} {rank}"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter("%(asctime)s.%(msecs)03d " + who.replace("%", "%%") + " | %(message)s", "%H:%M:%S")
    )
    logging.basicConfig(level=LEVELS[name], handlers=[handler], force=True)
