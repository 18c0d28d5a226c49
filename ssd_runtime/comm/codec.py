"""The strict msgpack codec of the control plane. Knows the messages, no sockets.

On the wire a message is `[version, name of the type, {field: value}]`. Decoding checks every value against the
annotation of its field; anything else is a `ProtocolError` that says what is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import Any, Literal

import msgpack

from ssd_runtime.comm.messages import MESSAGE_TYPES, Message
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, ProtocolError

MAX_MESSAGE_BYTES = 16 * 2**20


def encode(message: Message) -> bytes:
    """The bytes of a message; raises ProtocolError if a value in it cannot travel."""
    try:
        return msgpack.packb([PROTOCOL_VERSION, type(message).__name__, message.__dict__], default=_fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot encode {type(message).__name__}: {error}") from error


def decode(data: bytes) -> Message:
    """The message in `data`; raises ProtocolError on anything that `encode` of this version would not have made."""
    try:
        envelope = msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True)
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"not msgpack: {error}") from None
    if not (isinstance(envelope, tuple) and len(envelope) == 3):
        raise ProtocolError("not a message: expected [version, type, fields]")
    version, name, fields = envelope
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {version!r}, this side speaks {PROTOCOL_VERSION}")
    if not isinstance(name, str) or name not in MESSAGE_TYPES:
        raise ProtocolError(f"unknown message type {name!r}")
    return typing.cast(Message, _reader(typing.cast(Any, MESSAGE_TYPES[name]))(fields, name))


def _fields(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} is not a wire type")


Reader = Callable[[Any, str], Any]  # (value, where it stands) -> checked value


@functools.cache
def _reader(hint: Any) -> Reader:
    """The checker of one annotation; built once a type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(typing.cast(type, hint))
    if origin is Literal:
        return _literal_reader(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple_reader(arguments[0])
    if origin is tuple:
        return _fixed_tuple_reader(arguments)
    if origin is dict and arguments[0] is str:
        return _dict_reader(arguments[1])
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and arguments[1] is types.NoneType:
        inner = _reader(arguments[0])
        return lambda value, where: None if value is None else inner(value, where)
    if hint is float:
        return _read_float
    assert hint in (int, str, bool), f"no wire form for {hint!r}"
    return _scalar_reader(hint)


def _dataclass_reader(cls: type) -> Reader:
    hints = typing.get_type_hints(cls)
    readers = {name: _reader(hint) for name, hint in hints.items()}
    required = {
        spec.name
        for spec in dataclasses.fields(cls)
        if spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
    }

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _ill_typed(value, where, "a map of fields")
        for name in value:
            if name not in readers:
                raise ProtocolError(f"unknown field {where}.{name}")
        for name in required - value.keys():
            raise ProtocolError(f"missing field {where}.{name}")
        return cls(**{name: readers[name](item, f"{where}.{name}") for name, item in value.items()})

    return read


def _tuple_reader(item: Any) -> Reader:
    inner = _reader(item)

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, tuple):
            raise _ill_typed(value, where, "a list")
        if item is int and set(map(type, value)) <= {int}:  # prompts: thousands of them, all well
            return value
        return tuple(inner(element, f"{where}[{i}]") for i, element in enumerate(value))

    return read


def _fixed_tuple_reader(items: tuple[Any, ...]) -> Reader:
    inner = [_reader(item) for item in items]

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, tuple) or len(value) != len(inner):
            raise _ill_typed(value, where, f"a list of {len(inner)}")
        return tuple(
            reader(element, f"{where}[{i}]") for i, (reader, element) in enumerate(zip(inner, value, strict=True))
        )

    return read


def _dict_reader(item: Any) -> Reader:
    inner = _reader(item)

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _ill_typed(value, where, "a map from text")
        return {key: inner(element, f"{where}[{key!r}]") for key, element in value.items()}

    return read


def _literal_reader(options: tuple[Any, ...]) -> Reader:
    def read(value: Any, where: str) -> Any:
        if not isinstance(value, str) or value not in options:
            raise _ill_typed(value, where, f"one of {', '.join(options)}")
        return value

    return read


def _scalar_reader(kind: type) -> Reader:
    def read(value: Any, where: str) -> Any:
        if type(value) is not kind:
            raise _ill_typed(value, where, kind.__name__)
        return value

    return read


def _read_float(value: Any, where: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _ill_typed(value, where, "a finite float")
    return float(value)


def _ill_typed(value: Any, where: str, expected: str) -> ProtocolError:
    shown = repr(value)
    return ProtocolError(f"field {where} must be {expected}, not {shown[:60]}{'...' if len(shown) > 60 else ''}")
