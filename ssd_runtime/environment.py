"""Environment variables of ours and what they may say. Knows nobody who reads them.

One that is mistyped would otherwise be taken for one that is not set, and cost half the speed in silence. SSD_LOG is
checked by logs.py; SSD_CACHE may be any directory.
"""

from __future__ import annotations

from collections.abc import Mapping

from ssd_runtime.errors import ConfigError
from ssd_runtime.typed import shown

CHOICES = {
    "SSD_CUDA_EXT": ("0", "1"),
    "SSD_CPU_LEVEL": ("baseline", "avx2", "avx512"),
}


def check(environ: Mapping[str, str]) -> None:
    """Raise ConfigError for a variable that says none of what it may; an empty one counts as not set."""
    for name, choices in CHOICES.items():
        value = environ.get(name, "")
        if value and value not in choices:
            raise ConfigError(f"{name}={shown(value)} means nothing; use one of {', '.join(choices)}, or unset it")


def check_operators() -> None:
    """Raise ConfigError for compiled operators asked for that do not run on this CPU. Loads them, and torch."""
    from cuda_ext import ops

    try:
        ops.backend()
    except ValueError as error:
        raise ConfigError(str(error)) from None
