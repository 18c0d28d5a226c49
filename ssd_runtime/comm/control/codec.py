"""The strict msgpack codec of the control plane. Knows the messages, no sockets.

On the wire a message is `[version, name of the type, {field: value}]`. Decoding checks every value against the
annotation of its field, type and bound (typed.py); anything else is a `ProtocolError` that says what is wrong.
Whatever the bytes are, nothing else is raised, and time and memory are bounded by `Limits`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import msgpack
import msgspec

from ssd_runtime.comm.control.client_messages import RequestId
from ssd_runtime.comm.control.messages import MESSAGE_TYPES, Message
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, ProtocolError
from ssd_runtime.speculation.types import MOST_TOKENS
from ssd_runtime.typed import Unfit, shown, typed


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
MOST_BEGIN = 1200  # bytes in which the longest id stands behind the longest name of a type
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
        return typed(fields, MESSAGE_TYPES[name])
    except Unfit as unfit:
        where = f"{name}.{unfit.path}".rstrip(".")
        raise ProtocolError(f"field {where} {unfit.reason}", _request_id(fields)) from None


def _request_id(fields: Any) -> str | None:
    """That of a message which cannot be read, so that its sender can be told which of its requests failed."""
    try:
        return msgspec.convert(fields["request_id"], RequestId)
    except (KeyError, TypeError, msgspec.ValidationError):
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
