"""Everything that travels on the control plane, as frozen dataclasses, and their strict msgpack codec. No sockets.

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
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack

from ssd_runtime.comm.protocol import PROTOCOL_VERSION as PROTOCOL_VERSION
from ssd_runtime.comm.protocol import FrameShape as FrameShape
from ssd_runtime.comm.protocol import ProtocolError as ProtocolError
from ssd_runtime.comm.protocol import VocabularyDigest as VocabularyDigest
from ssd_runtime.config import Mode
from ssd_runtime.speculation.types import SamplingParams

Role = Literal["target", "draft"]
MAX_MESSAGE_BYTES = 16 * 2**20


# ---- target <-> draft ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hello:
    """Draft -> target, first: who I am and what I would work with."""

    version: int
    role: Role
    rank: int
    config_digest: str
    vocabulary: VocabularyDigest


@dataclass(frozen=True)
class LinkAddress:
    """Where and under which name the two sides meet for one data link.

    Attributes:
        host, port: of the target's TCPStore.
        session: random name of this engine, so that a stranger on a reused port is not met.
        epoch: counts the links of this engine.
        shape: sizes of the frames.
    """

    host: str
    port: int
    session: str
    epoch: int
    shape: FrameShape


@dataclass(frozen=True)
class Welcome:
    """Target -> draft: accepted; build this link. Control messages count from zero (control_seq) from here on."""

    link: LinkAddress


@dataclass(frozen=True)
class Refused:
    """The answer to a Hello that does not fit, or to bytes that are no message."""

    reason: str


@dataclass(frozen=True)
class Admit:
    """Target -> draft: a sequence begins. Counts towards control_seq."""

    sequence_id: int
    prompt_tokens: tuple[int, ...]
    params: SamplingParams
    mode: Mode
    lookahead: int
    max_tokens: int


@dataclass(frozen=True)
class Finish:
    """Target -> draft: a sequence is over. Counts towards control_seq."""

    sequence_id: int


@dataclass(frozen=True)
class Heartbeat:
    """I am alive and have nothing to say."""


@dataclass(frozen=True)
class Shutdown:
    """Stop what you do and leave. Sent by the leader to the draft, and by the launcher to the leader."""

    reason: str


# ---- clients <-> leader ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Generate:
    """Client -> leader: exactly one of prompt, messages and token_ids. None for mode or lookahead: as configured.

    Attributes:
        stream: chunks as tokens come; False: one chunk at the end, which costs the leader less.
    """

    request_id: str
    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    mode: Mode | None = None
    lookahead: int | None = None
    ignore_eos: bool = False
    stream: bool = True


@dataclass(frozen=True)
class Chunk:
    """Leader -> client: text and tokens that are now final."""

    request_id: str
    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens paid for: nothing that was cut off is counted."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class RequestStatistics:
    """What one request cost. Seconds and milliseconds as named.

    Attributes:
        rounds: verifications after prefill.
        accepted_per_position: entry i counts the rounds that accepted draft token i.
        lookups, hits: of the speculation cache.
        ttft_seconds: from arrival to the first token.
        round_ms: rounds that were hits only, from the start of one verification to the start of the next.
        verify_ms, wait_ms, other_ms: one entry a round.
        draft_step_ms, draft_step_width: one entry a drafting step.
    """

    mode: Mode
    rounds: int = 0
    num_tokens: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    lookups: int = 0
    hits: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    ttft_seconds: float = 0.0
    round_ms: tuple[float, ...] = ()
    verify_ms: tuple[float, ...] = ()
    wait_ms: tuple[float, ...] = ()
    other_ms: tuple[float, ...] = ()
    draft_step_ms: tuple[float, ...] = ()
    draft_step_width: tuple[int, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Leader -> client: the request is complete. "stop": EOS or a stop string; "abort": cancelled."""

    request_id: str
    finish_reason: Literal["stop", "length", "abort"]
    usage: Usage
    statistics: RequestStatistics


@dataclass(frozen=True)
class Failed:
    """Leader -> client: "request" is the client's to mend, "engine" is ours."""

    request_id: str
    kind: Literal["request", "engine"]
    reason: str


@dataclass(frozen=True)
class Cancel:
    """Client -> leader: stop working on this request."""

    request_id: str


@dataclass(frozen=True)
class GetStatus:
    """Client -> leader: how are you?"""


@dataclass(frozen=True)
class Status:
    """Leader -> client.

    Attributes:
        cores: role -> CPU cores it is pinned to.
    """

    state: Literal["loading", "ready", "stopping"]
    draft: Literal["none", "linked", "lost"]
    target_model: str
    draft_model: str
    mode: Mode
    num_running: int = 0
    num_waiting: int = 0
    cores: dict[str, tuple[int, ...]] = field(default_factory=dict)


# ---- workers -> launcher ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Worker -> launcher: a phase that takes long (0 to 1)."""

    role: Role
    rank: int
    phase: str
    fraction: float


@dataclass(frozen=True)
class Ready:
    """Leader -> launcher: requests are taken at `address`."""

    address: str
    cores: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class WorkerFailed:
    """Worker -> launcher, last: "config" is the user's to mend (exit code 2), "runtime" is not (exit code 1)."""

    role: Role
    rank: int
    kind: Literal["config", "runtime"]
    reason: str


Message = (
    Hello | Welcome | Refused | Admit | Finish | Heartbeat | Shutdown
    | Generate | Chunk | Finished | Failed | Cancel | GetStatus | Status
    | Progress | Ready | WorkerFailed
)  # fmt: skip
MESSAGE_TYPES: dict[str, type[Message]] = {cls.__name__: cls for cls in typing.get_args(Message)}


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
