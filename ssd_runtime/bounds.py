"""What a field of a stranger's message or file may hold, said in its annotation. Knows no fields and no formats.

    temperature: Annotated[float, Within(0.0, 100.0)]
    stop: Annotated[tuple[Annotated[str, AtMost(1024)], ...], AtMost(16)]

Whoever reads the field checks `allows` and says what is wrong with `refusal`.
"""

from __future__ import annotations

import typing
from collections.abc import Sized
from dataclasses import dataclass
from typing import Any

MOST_SHOWN = 60  # characters of a value in an error


@dataclass(frozen=True)
class Within:
    """A number between two finite ones; what is no number (NaN) or infinite is outside.

    Attributes:
        least, most: both allowed themselves.
        above: `least` itself is not allowed.
    """

    least: float
    most: float
    above: bool = False

    def allows(self, value: float) -> bool:
        return self.least <= value <= self.most and not (self.above and value == self.least)

    @property
    def wanted(self) -> str:
        """What is allowed, to stand behind "must be"."""
        if self.above:
            return f"above {_number(self.least)} and at most {_number(self.most)}"
        return f"between {_number(self.least)} and {_number(self.most)}"


@dataclass(frozen=True)
class AtMost:
    """Text of so many bytes in UTF-8; a list or a map of so many entries."""

    count: int

    def allows(self, value: Sized) -> bool:
        if not isinstance(value, str) or 4 * len(value) <= self.count:
            return len(value) <= self.count
        return len(value) <= self.count and len(value.encode("utf-8", "surrogatepass")) <= self.count

    @property
    def wanted(self) -> str:
        """What is allowed, to stand behind "must have"."""
        return f"at most {self.count}"


Bound = Within | AtMost


def split(hint: Any) -> tuple[Any, Bound | None]:
    """An annotation as its bare type and its bound, if it has one."""
    if typing.get_origin(hint) is not typing.Annotated:
        return hint, None
    bare, *about = typing.get_args(hint)
    return bare, next((bound for bound in about if isinstance(bound, Within | AtMost)), None)


def refusal(value: Any, bound: Bound) -> str:
    """What is wrong with a value that is not allowed, to stand behind the name of its field."""
    if isinstance(bound, Within):
        return f"must be {bound.wanted}, not {shown(value)}"
    if isinstance(value, str):
        return f"must have {bound.wanted} bytes, not {len(value.encode('utf-8', 'surrogatepass'))}"
    return f"must have {bound.wanted} entries, not {len(value)}"


def shown(value: Any) -> str:
    """A value of any size and depth in a few characters, for an error."""
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= MOST_SHOWN else f"{value[:MOST_SHOWN]!r}... ({len(value)} long)"
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to write integers of thousands of digits
        return f"a number of {value.bit_length()} bits"
    if value is None or isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple | dict):
        return f"a {'map' if isinstance(value, dict) else 'list'} of {len(value)}"
    return f"a {type(value).__name__}"


def _number(value: float) -> str:
    """Large ones as powers of two, which can be read."""
    size = abs(value)
    if not isinstance(size, int):
        return f"{value:g}"
    if size < 1 << 31:
        return str(value)
    power = size.bit_length() if size & (size + 1) == 0 else size.bit_length() - 1
    rest = " - 1" if size == (1 << power) - 1 else ""
    return f"{'-' if value < 0 else ''}2^{power}{rest}" if rest or size == 1 << power else str(value)
