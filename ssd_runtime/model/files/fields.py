"""Typed values out of a mapping that strangers wrote; every refusal names the key. Knows no models."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ssd_runtime.errors import ConfigError


@dataclass(frozen=True)
class Fields:
    """A mapping of keys to anything.

    Attributes:
        who: begins messages: which model, which file.
        prefix: in front of every key, in the mapping and in messages.
    """

    values: Mapping[str, Any]
    who: str
    prefix: str = ""

    def has(self, key: str) -> bool:
        return self.prefix + key in self.values

    def get(self, key: str) -> Any:
        """As it stands; None where it is missing or null."""
        return self.values.get(self.prefix + key)

    def integer(self, key: str, missing: int | None = None) -> int:
        """Raises ConfigError for no whole number, and for a missing key unless `missing` is its value then."""
        return int(self._value(key, missing, (int,), "a whole number"))

    def number(self, key: str, missing: float | None = None) -> float:
        """As `integer`, for a finite number."""
        value = self._value(key, missing, (int, float), "a finite number")
        if not abs(value) <= sys.float_info.max:  # nor is NaN
            raise self.refusal(key, "a finite number")
        return float(value)

    def flag(self, key: str, missing: bool | None = None) -> bool:
        """As `integer`, for true or false."""
        return bool(self._value(key, missing, (bool,), "true or false"))

    def refusal(self, key: str, wanted: str) -> ConfigError:
        """The error to raise when this key's value is not what is wanted."""
        return ConfigError(f"{self.who}: {self.prefix}{key} is {brief(self.get(key))}, not {wanted}; fetch it again")

    def _value(self, key: str, missing: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        if not self.has(key) and missing is None:
            raise ConfigError(f"{self.who}: key {self.prefix}{key!s} is missing; it is incomplete, fetch it again")
        value = self.values.get(self.prefix + key, missing)
        if type(value) not in kinds:  # a bool is no int
            raise self.refusal(key, wanted)
        return value


def brief(value: Any) -> str:
    """A stranger's value as part of one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists within lists
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def brief_error(error: BaseException) -> str:
    """The message of a foreign error as the part of one line."""
    return " ".join(str(error).split())[:200]
