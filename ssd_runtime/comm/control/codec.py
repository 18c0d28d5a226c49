"""The strict msgpack codec of the control plane. Knows the messages, no sockets.

On the wire a message is `[version, name of the type, {field: value}]`. Decoding checks every value against the
annotation of its field, type and bound; anything else is a `ProtocolError` that says what is wrong. Whatever the bytes
are, nothing else is raised, and time and memory are bounded by `Limits`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgpack

from ssd_runtime.bounds import MOST_SHOWN, AtMost, Within, refusal, shown, split
from ssd_runtime.comm.control.client_messages import RequestId
from ssd_runtime.comm.control.messages import MESSAGE_TYPES, Message
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, ProtocolError
from ssd_runtime.speculation.types import MOST_TOKENS


@dataclass(frozen=True)
class Limits:
    """How much is read of one message.

    Attributes:
        bytes: of it; a longer one ends the connection.
        containers: lists and maps in it, which cost far more than their bytes.
        entries: of all of them together, each of which is an object.
    """

    bytes: int
    containers: int
    entries: int

    def for_prompts(self, max_model_len: int) -> Limits:
        """What is needed where a prompt has no more tokens than that: reading takes no longer than it must."""
        return dataclasses.replace(self, entries=min(self.entries, MOST_NAMED + max_model_len))


MOST_NAMED = 2**18  # entries beside the token ids of a prompt
MOST_PAIRS = 2**10  # of one map
MOST_BEGIN = 400  # bytes in which the longest id stands behind the longest name of a type
ASKED = Limits(6 * 2**20, 2**14, MOST_NAMED + MOST_TOKENS)  # of anyone
ANSWERED = Limits(16 * 2**20, 2**20, 2**24)  # of the engine that one is a client, a draft or a launcher of


def encode(message: Message) -> bytes:
    """The bytes of a message; raises ProtocolError if a value in it cannot travel."""
    try:
        return msgpack.packb([PROTOCOL_VERSION, type(message).__name__, message.__dict__], default=_fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ProtocolError(f"cannot encode {type(message).__name__}: {error}") from error


def decode(data: bytes, limits: Limits = ASKED) -> Message:
    """The message in `data`.

    Raises:
        ProtocolError: it is nothing that `encode` of this version would have made within all bounds.
    """
    try:
        return _message(_unpacked(data, limits))
    except _TooMuch as error:
        raise ProtocolError(str(error), _first_id(data)) from None
    except ProtocolError:
        raise
    except Exception as error:  # noqa: BLE001 (the one place: whatever bytes bring about is their sender's fault)
        raise ProtocolError(f"not msgpack: {type(error).__name__} {str(error)[:100]}") from None


class _TooMuch(ProtocolError):
    """A message beyond the limits, of which no more is read."""


def _unpacked(data: bytes, limits: Limits) -> Any:
    """What msgpack makes of the bytes; it nests no deeper than 1024."""
    if len(data) > limits.bytes:
        raise _TooMuch(f"a message of {len(data)} bytes; at most {limits.bytes} are read")
    # A list is allocated by the length it claims. Walking over all of it first, which allocates nothing, shows that
    # what is claimed is there.
    walk = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    walk.feed(data)
    walk.skip()
    containers = entries = 0

    def count(container: Any) -> Any:
        nonlocal containers, entries
        containers, entries = containers + 1, entries + len(container)
        if containers > limits.containers:
            raise _TooMuch(f"a message of more than {limits.containers} lists and maps")
        if entries > limits.entries:
            raise _TooMuch(f"a message of more than {limits.entries} entries in all its lists and maps")
        return container

    try:
        return msgpack.unpackb(
            data,
            raw=False,
            use_list=False,
            strict_map_key=True,
            max_ext_len=0,
            max_array_len=limits.entries,
            max_map_len=min(limits.entries, MOST_PAIRS),
            object_hook=count,
            list_hook=count,
        )
    except ValueError as error:
        if "exceeds max_" not in str(error) or "ext_len" in str(error):
            raise
        raise _TooMuch(f"a message with a list or map that is too long: {error}") from None


def _message(envelope: Any) -> Message:
    if not (isinstance(envelope, tuple) and len(envelope) == 3):
        raise ProtocolError("not a message: expected [version, type, fields]")
    version, name, fields = envelope
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise ProtocolError(f"protocol version {shown(version)}, this side speaks {PROTOCOL_VERSION}")
    if not isinstance(name, str) or name not in MESSAGE_TYPES:
        raise ProtocolError(f"unknown message type {shown(name)}")
    try:
        return typing.cast(Message, _reader(typing.cast(Any, MESSAGE_TYPES[name]))(fields, name))
    except ProtocolError as error:
        raise ProtocolError(str(error), _request_id(fields)) from None


def _request_id(fields: Any) -> str | None:
    """That of a message which cannot be read, so that its sender can be told which of its requests failed."""
    try:
        return typing.cast(str, _reader(RequestId)(fields.get("request_id"), "request_id"))
    except (AttributeError, ProtocolError):
        return None


def _first_id(data: bytes) -> str | None:
    """The same of a message that was not read, if it begins with it as those of `encode` do."""
    begin = msgpack.Unpacker(raw=False)
    begin.feed(data[:MOST_BEGIN])
    try:
        for skip in (begin.read_array_header, begin.skip, begin.skip, begin.read_map_header):
            skip()
        return _request_id({begin.unpack(): begin.unpack()})
    except Exception:  # noqa: BLE001 (it begins with something else, whatever that is)
        return None


def _fields(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return value.__dict__
    raise TypeError(f"{type(value).__name__} is not a wire type")


Reader = Callable[[Any, str], Any]  # (value, where it stands) -> checked value


@functools.cache
def _reader(hint: Any) -> Reader:
    """The checker of one annotation; built once a type."""
    bare, bound = split(hint)
    if bound is not None:
        return _within(_reader(bare), bound) if isinstance(bound, Within) else _at_most(_reader(bare), bound)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _dataclass_reader(typing.cast(type, hint))
    if origin is Literal:
        return _literal_reader(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _tuple_reader(arguments[0])
    if origin is tuple:
        return _fixed_tuple_reader(arguments)
    if origin is dict:
        return _dict_reader(*arguments)
    if origin in (types.UnionType, typing.Union) and len(arguments) == 2 and arguments[1] is types.NoneType:
        inner = _reader(arguments[0])
        return lambda value, where: None if value is None else inner(value, where)
    if hint is float:
        return _read_float
    assert hint in (int, str, bool), f"no wire form for {hint!r}"
    return _scalar_reader(hint)


def _within(inner: Reader, bound: Within) -> Reader:
    def read(value: Any, where: str) -> Any:
        number = inner(value, where)
        if not bound.allows(number):
            raise ProtocolError(f"field {where} {refusal(number, bound)}")
        return number

    return read


def _at_most(inner: Reader, bound: AtMost) -> Reader:
    """Looks at the size before it looks at what is inside."""

    def read(value: Any, where: str) -> Any:
        if isinstance(value, str | tuple | dict) and not bound.allows(value):
            raise ProtocolError(f"field {where} {refusal(value, bound)}")
        return inner(value, where)

    return read


def _dataclass_reader(cls: type) -> Reader:
    hints = typing.get_type_hints(cls, include_extras=True)
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
                raise ProtocolError(f"unknown field {where}.{name if len(name) <= MOST_SHOWN else shown(name)}")
        for name in required - value.keys():
            raise ProtocolError(f"missing field {where}.{name}")
        return cls(**{name: readers[name](item, f"{where}.{name}") for name, item in value.items()})

    return read


def _tuple_reader(item: Any) -> Reader:
    inner = _reader(item)
    kind, bound = split(item)

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, tuple):
            raise _ill_typed(value, where, "a list")
        if not value:
            return value
        integers = kind is int and set(map(type, value)) == {int}  # prompts: thousands of them, all well
        if integers and (bound is None or (bound.allows(min(value)) and bound.allows(max(value)))):
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


def _dict_reader(key: Any, item: Any) -> Reader:
    read_key, inner = _reader(key), _reader(item)

    def read(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise _ill_typed(value, where, "a map from text")
        return {
            read_key(key, f"{where} (a key)"): inner(element, f"{where}[{shown(key)}]")
            for key, element in value.items()
        }

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
    return ProtocolError(f"field {where} must be {expected}, not {shown(value)}")
