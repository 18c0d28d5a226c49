"""Values of strangers as typed records, by msgspec, and what is wrong with one in a short line. Knows no formats.

    temperature: Annotated[float, Meta(ge=0, le=100)]
    stop: Annotated[tuple[Annotated[str, Meta(max_length=1024)], ...], Meta(max_length=16)]

A range has both ends, which neither NaN nor infinity is between. Text is measured in characters.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from typing import Annotated, Any, Literal, TypeVar

import msgspec

MOST_SHOWN = 60  # characters of a value in an error
_NAMES = {int: "int", float: "float", str: "str", bool: "bool", tuple: "a list", dict: "a map"}
_PATH = re.compile(r" - at (`key` in )?`\$(\S*)`$")
_STEP = re.compile(r"\.(\w+)|\[(\d+|\.\.\.)\]")

Record = TypeVar("Record")


class Unfit(ValueError):
    """A value is not what a record wants.

    Attributes:
        path: of the field, as `params.logit_bias[0][1]`; empty for all of it.
        reason: to stand behind the name of the field.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path} {reason}")
        self.path, self.reason = path, reason


def typed(value: Any, kind: type[Record]) -> Record:
    """The dataclass that a map of scalars, lists and maps says; raises Unfit for the first thing that does not fit."""
    try:
        record = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _unfit(str(error), value, kind) from None
    _refuse_unknown(value, record, "")
    return record


def _refuse_unknown(value: Any, made: Any, path: str) -> None:
    """msgspec passes over the keys that a dataclass has no field for."""
    if fields := getattr(made, "__dataclass_fields__", None):
        for key in (key for key in value if key not in fields):
            raise Unfit(path + (key if len(key) <= MOST_SHOWN else shown(key)), f"is unknown; {_meant(key, [*fields])}")
        for key, inner in value.items():
            if isinstance(inner, dict | list | tuple):
                _refuse_unknown(inner, getattr(made, key), f"{path}{key}.")
    elif isinstance(made, tuple) and made and hasattr(made[0], "__dataclass_fields__"):
        for i, (inner, one) in enumerate(zip(value, made, strict=True)):
            _refuse_unknown(inner, one, f"{path[:-1]}[{i}].")
    elif isinstance(made, dict):
        for key, one in made.items():
            _refuse_unknown(value[key], one, f"{path[:-1]}[{shown(key)}].")


def _meant(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key[:MOST_SHOWN], known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _unfit(error: str, value: Any, hint: Any) -> Unfit:
    """msgspec says where; what is wanted is in the annotation there, and what is given in the value."""
    place = _PATH.search(error)
    path = place[2] if place else ""
    if place and (place[1] or "[...]" in path):  # which entry of a map it is, is not said
        said = error[: place.start()].replace("`", "").lower()
        return Unfit(path.lstrip("."), f"has a {'key' if place[1] else 'value'} that does not fit: {said[:200]}")
    for name, index in _STEP.findall(path):
        hint, value = _inside(hint, name or index), value[name or int(index)]
    if missing := re.match(r"Object missing required field `(\w+)`", error):
        return Unfit(f"{path}.{missing[1]}".lstrip("."), "is missing")
    return Unfit(path.lstrip("."), f"must {_wanted(hint, value)}")


def _bare(hint: Any) -> tuple[Any, msgspec.Meta]:
    """An annotation as its type, without None, and its bounds."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Annotated:
        return typing.get_args(hint)[:2]
    return hint, msgspec.Meta()


def _inside(hint: Any, step: str) -> Any:
    """The annotation of a field, or of an entry of a list."""
    bare, _ = _bare(hint)
    if dataclasses.is_dataclass(bare):
        return typing.get_type_hints(bare, include_extras=True)[step]
    arguments = typing.get_args(bare)
    return arguments[0 if arguments[-1] is Ellipsis else int(step)]


def _wanted(hint: Any, value: Any) -> str:
    """What an annotation asks for and a value is not, to stand behind "must"."""
    bare, meta = _bare(hint)
    origin, arguments = typing.get_origin(bare) or bare, typing.get_args(bare)
    if origin is Literal:
        return f"be one of {', '.join(arguments)}, not {shown(value)}"
    if type(value) in {float: (int, float), tuple: (list, tuple)}.get(origin, (origin,)):  # so it is out of bounds
        if meta.max_length is not None and len(value) > meta.max_length:
            return f"have at most {meta.max_length} {'characters' if bare is str else 'entries'}, not {len(value)}"
        if meta.le is not None:
            least = f"between {meta.ge} and" if meta.gt is None else f"above {meta.gt} and at most"
            return f"be {least} {meta.le}, not {shown(value)}"
        if meta.ge is not None:
            return f"be at least {meta.ge}, not {shown(value)}"
        if meta.pattern is not None:
            return f"be UTF-8 without control characters, not {shown(value)}"
    count = f" of {len(arguments)}" if origin is tuple and arguments[-1] is not Ellipsis else ""
    return f"be {_NAMES.get(origin, 'a map of fields')}{count}, not {shown(value)}"


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
