"""The control plane's codec: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import contextlib
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.client_messages import Cancel, ChatMessage, Generate, RequestStatistics
from ssd_runtime.comm.control.codec import decode, encode
from ssd_runtime.comm.control.messages import MESSAGE_TYPES, Message
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, ProtocolError
from ssd_runtime.speculation.types import SamplingParams
from tests.wire import messages_of


def packed(name: str, fields: dict[Any, Any], version: Any = PROTOCOL_VERSION) -> bytes:
    data: bytes = msgpack.packb([version, name, fields])
    return data


@pytest.mark.parametrize("name", MESSAGE_TYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_message_survives_the_wire(name: str, data: st.DataObject) -> None:
    message: Message = data.draw(messages_of(MESSAGE_TYPES[name]))
    assert decode(encode(message)) == message


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100))
def test_arbitrary_bytes_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode(data)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_messages_are_messages_or_protocol_errors_never_another_error(data: st.DataObject) -> None:
    raw = bytearray(encode(Generate("r", messages=(ChatMessage("user", "hello"),), stop=("a", "b"), mode="ssd")))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        decode(bytes(raw))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (packed("Cancel", {"request_id": "a"}, PROTOCOL_VERSION + 1), "protocol version"),
        (packed("Cancel", {"request_id": "a"}, True), "protocol version True"),
        (packed("Explode", {}), "unknown message type 'Explode'"),
        (packed("Cancel", {}), "field Cancel.request_id is missing"),
        (packed("Cancel", {"request_id": "a", "why": 1}), "field Cancel.why is unknown; known: request_id"),
        (packed("Cancel", {"request_id": 7}), "Cancel.request_id must be str, not 7"),
        (packed("Finish", {"sequence_id": True}), "Finish.sequence_id must be int, not True"),
        (packed("Finish", {"sequence_id": 1.0}), "Finish.sequence_id must be int"),
        (packed("Generate", {"request_id": "a", "mode": "fast"}), "Generate.mode must be one of ar, sd"),
        (packed("Generate", {"request_id": "a", "token_ids": [1, "2"]}), r"Generate.token_ids\[1\] must be int"),
        (packed("Generate", {"request_id": "a", "params": {"heat": 1}}), "field Generate.params.heat is unknown"),
        (
            packed("Generate", {"request_id": "a", "params": {"top_p": float("nan")}}),
            "top_p must be above 0 and at most 1",
        ),
        (
            packed("Generate", {"request_id": "a", "params": {"logit_bias": [[1]]}}),
            r"logit_bias\[0\] must be a list of 2, not a list of 1",
        ),
        (
            packed("Generate", {"request_id": "a", "params": {"logit_bias": [[1, "x"]]}}),
            r"bias\[0\]\[1\] must be float, not 'x'",
        ),
        (packed("Status", {"state": "ready"}), r"field Status\.\w+ is missing"),
        (
            packed("Ready", {"address": "a", "cores": {b"x": [1]}}),
            "Ready.cores has a key that does not fit",
        ),
        (msgpack.packb({"type": "Cancel"}), "expected .version, type, fields."),
        (encode(Cancel("a")) + b"\x00", "not msgpack"),
        (b"", "not msgpack"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason):
        decode(data)


def test_fields_with_defaults_may_be_left_out_by_a_client() -> None:
    assert decode(packed("Generate", {"request_id": "a", "prompt": "hi"})) == Generate("a", prompt="hi")


def test_whole_numbers_are_fine_where_floats_are_expected() -> None:
    decoded = decode(packed("Generate", {"request_id": "a", "params": {"temperature": 1}}))
    assert isinstance(decoded, Generate)
    assert isinstance(decoded.params.temperature, float)


def test_a_value_that_cannot_travel_is_named_when_it_is_sent() -> None:
    with pytest.raises(ProtocolError, match="cannot encode Cancel"):
        encode(Cancel(object()))  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="cannot encode Cancel"):
        encode(Cancel("\ud800"))


def test_large_seeds_and_long_prompts_travel() -> None:
    request = Generate("r", token_ids=tuple(range(100_000)), params=SamplingParams(seed=2**63))
    assert decode(encode(request)) == request


def test_every_message_is_frozen_and_documented() -> None:
    for cls in [*MESSAGE_TYPES.values(), RequestStatistics]:
        assert cls.__dataclass_params__.frozen, cls  # type: ignore[union-attr]
        assert cls.__doc__, cls
        assert not cls.__doc__.startswith(f"{cls.__name__}("), cls
