"""Messages of strangers: whatever the bytes, a message within its bounds or a ProtocolError, in bounded time."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssd_runtime.comm.control.client_messages import Cancel, ChatMessage, Generate
from ssd_runtime.comm.control.codec import ANSWERED, ASKED, Limits, decode, encode
from ssd_runtime.comm.control.draft_messages import Admit
from ssd_runtime.comm.control.messages import MESSAGE_TYPES
from ssd_runtime.comm.protocol import PROTOCOL_VERSION, FrameShape, ProtocolError
from ssd_runtime.speculation.types import (
    MOST_TOKENS,
    Branch,
    Outcome,
    OutcomeFrame,
    OutcomeRow,
    Plan,
    SamplingParams,
    TreeFrame,
)
from tests.hostile import HOSTILE, SERVED
from tests.wire import check, hints_of, is_range, messages_of, split

ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([-(2**63), -1, 0, 2**31, 2**48 + 1, 2**63, 2**64 - 1])
    | st.floats()
    | st.text(max_size=30)
    | st.binary(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def unbounded(hint: Any, where: str) -> Iterator[str]:
    """Where a number, text or list comes without a bound."""
    bare, bound = split(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if dataclasses.is_dataclass(bare):
        for name, field in hints_of(typing.cast(type, bare)).items():
            yield from unbounded(field, f"{where}.{name}")
    elif origin in (types.UnionType, typing.Union, tuple, dict):
        if (origin is dict or arguments[-1] is Ellipsis) and bound.max_length is None:
            yield f"{where}: {hint}"
        for inner in arguments:
            if inner is not Ellipsis:
                yield from unbounded(inner, where)
    elif (bare is str and bound.max_length is None) or (bare in (int, float) and not is_range(bound)):
        yield f"{where}: {hint}"
    else:
        assert origin is Literal or bare in (str, int, float, bool, types.NoneType), f"{where}: {hint}"


def read_safely(data: bytes, limits: Limits = ASKED) -> Any:
    """The message, every field of which is within its bounds; None for a ProtocolError of a bearable length."""
    try:
        message = decode(data, limits)
    except ProtocolError as error:
        reason = str(error)
        if len(reason) > 400:
            raise AssertionError(f"more is shown than a few characters of what a stranger sent: {reason}") from None
        return None
    check(message, type(message))
    return message


def places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree of lists and maps, as a container and a key."""
    for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
        yield tree, key
        if isinstance(value, dict | list):
            yield from places(value)


def test_every_number_text_and_list_of_every_message_has_bounds() -> None:
    found = [place for name, cls in MESSAGE_TYPES.items() for place in unbounded(cls, name)]
    assert found == []


@pytest.mark.parametrize("cls", [OutcomeFrame, OutcomeRow, Outcome, Plan, TreeFrame, Branch, FrameShape])
def test_every_number_of_the_frames_has_bounds(cls: type) -> None:
    """Their lists are bounded by the shape of the link (test_messages_frames.py)."""
    numbers = {name for name, hint in hints_of(cls).items() if split(hint)[0] in (int, float)}
    assert numbers
    assert all(is_range(split(hints_of(cls)[name])[1]) for name in numbers)


@pytest.mark.parametrize("name", MESSAGE_TYPES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_anything_in_any_place_of_any_message_is_within_bounds_or_a_protocol_error(
    name: str, data: st.DataObject
) -> None:
    tree = msgpack.unpackb(encode(data.draw(messages_of(MESSAGE_TYPES[name]))))
    container, key = data.draw(st.sampled_from(list(places(tree))))
    container[key] = data.draw(ANYTHING)
    read_safely(msgpack.packb(tree), ANSWERED)


@settings(max_examples=100, deadline=None)
@given(messages_of(Generate), messages_of(Admit), st.data())
def test_cut_spliced_and_flipped_bytes_are_within_bounds_or_a_protocol_error(
    request: Generate, admit: Admit, data: st.DataObject
) -> None:
    one, other = bytearray(encode(request)), bytearray(encode(admit))
    at, there = data.draw(st.integers(0, len(one))), data.draw(st.integers(0, len(other)))
    mixed = one[:at] + data.draw(st.binary(max_size=9)) + other[there:]
    for place in data.draw(st.lists(st.integers(0, max(0, len(mixed) - 1)), max_size=3)):
        if mixed:
            mixed[place] ^= data.draw(st.integers(1, 255))
    read_safely(bytes(mixed))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            {"params": {"top_k": 2**63}},
            r"Generate.params.top_k must be between 0 and 2147483647, not 9223372036854775808",
        ),
        ({"params": {"seed": -1}}, r"Generate.params.seed must be at least 0, not -1"),
        ({"params": {"temperature": 101}}, "Generate.params.temperature must be between 0 and 100, not 101"),
        ({"params": {"top_p": 0}}, "Generate.params.top_p must be above 0 and at most 1"),
        ({"params": {"logit_bias": [[1, 101.0]]}}, "must be between -100 and 100"),
        ({"params": {"logit_bias": [[1, 1.0]] * (2**12 + 1)}}, "logit_bias must have at most 4096 entries, not 4097"),
        ({"token_ids": [1, 2**31]}, r"Generate.token_ids\[1\] must be between 0 and 2147483647, not 2147483648"),
        ({"token_ids": [-1]}, r"Generate.token_ids\[0\] must be between"),
        ({"n": 129}, "Generate.n must be between 1 and 128, not 129"),
        ({"max_tokens": 0}, "Generate.max_tokens must be between 1 and"),
        ({"logprobs": 21}, "Generate.logprobs must be between 0 and 20, not 21"),
        (
            {"messages": [{"role": "", "content": ""}] * 5000},
            "Generate.messages must have at most 4096 entries, not 5000",
        ),
        (
            {"messages": [{"role": "x" * 65, "content": ""}]},
            r"messages\[0\].role must have at most 64 .*, not 65",
        ),
        ({"stop": ["x"] * 257}, "Generate.stop must have at most 256 entries, not 257"),
        ({"request_id": "é" * 257}, "Generate.request_id must have at most 256 characters, not 257"),
        ({"x" * 10**6: 1}, r"field Generate.'xxx.*1000000 long\) is unknown; known: request_id, prompt"),
    ],
)
def test_what_is_out_of_range_is_refused_by_field_range_and_value(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ProtocolError, match=reason) as caught:
        decode(msgpack.packb([PROTOCOL_VERSION, "Generate", {"request_id": "a", **fields}]))
    assert len(str(caught.value)) < 300
    assert caught.value.request_id == (None if "request_id" in fields else "a")


@pytest.mark.parametrize("name", ["Generate", "Cancel"])
def test_the_request_of_a_message_that_cannot_be_read_is_known(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(msgpack.packb([PROTOCOL_VERSION, name, {"request_id": "mine", "surprise": 1}]))
    assert caught.value.request_id == "mine"


@pytest.mark.parametrize("fields", [{"request_id": 7}, {"request_id": "x" * 300}, {}, [], 3, None])
def test_no_request_is_known_where_none_is_named(fields: Any) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(msgpack.packb([PROTOCOL_VERSION, "Cancel", fields]))
    assert caught.value.request_id is None


@pytest.mark.parametrize("shape", HOSTILE)
@pytest.mark.parametrize(("limits", "most_s"), [(ASKED, 0.6), (SERVED, 0.3)])  # measured: 0.114 and 0.03 s at most
def test_no_message_takes_long_to_read(shape: str, limits: Limits, most_s: float) -> None:
    assert len(HOSTILE[shape]) <= ASKED.bytes
    begin = time.thread_time()
    with contextlib.suppress(ProtocolError):
        decode(HOSTILE[shape], limits)
    assert time.thread_time() - begin < most_s


def test_a_message_is_read_up_to_its_limits_and_no_further() -> None:
    data = encode(Cancel("r"))  # a list of three with a map of one pair in it
    enough = Limits(len(data), 2, 4)
    assert decode(data, enough)
    for changes, reason in (
        ({"bytes": len(data) - 1}, f"a message of {len(data)} bytes; at most {len(data) - 1} are read"),
        ({"containers": 1}, "a message of more than 1 lists and maps"),
        ({"entries": 3}, "a message of more than 3 entries in all its lists and maps"),
        ({"entries": 2}, "a list or map that is too long: 3 exceeds"),
    ):
        with pytest.raises(ProtocolError, match=reason) as caught:
            decode(data, dataclasses.replace(enough, **changes))
        assert caught.value.request_id == "r"  # though it was not read


@pytest.mark.parametrize(
    "data", [b"", b"\x93", b"\x93\x07\xa6Cancel\x81", b"\x93\x07\xa6Cancel\x81\xa1x\x01", b"\xc1" * 9]
)
def test_whose_a_message_is_that_was_not_read_is_not_guessed(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="bytes; at most 3 are read") as caught:
        decode(data + bytes(9), Limits(3, 2, 4))
    assert caught.value.request_id is None


@pytest.mark.parametrize("max_model_len", [1, 2048, MOST_TOKENS])
def test_the_largest_request_that_an_engine_may_serve_is_read(max_model_len: int) -> None:
    """With everything that its parameters may name."""
    params = SamplingParams(
        logit_bias=tuple((token, -1.5) for token in range(2**12)),
        allowed_tokens=tuple(range(2**16)),
        banned_tokens=tuple(range(2**15)),
    )
    whole = Generate("r", token_ids=(1,) * max_model_len, params=params, stop=("x",) * 2**8)
    assert decode(encode(whole), ASKED.for_prompts(max_model_len)) == whole
    talked = Generate("r", messages=(ChatMessage("user", "x"),) * 2**12, params=params)
    assert decode(encode(talked), ASKED.for_prompts(max_model_len)) == talked


def test_the_longest_prompt_fits_into_what_a_client_may_send() -> None:
    for request in (Generate("r", token_ids=(2**31 - 1,) * MOST_TOKENS), Generate("r", prompt="x" * (5 * MOST_TOKENS))):
        assert len(encode(request)) <= ASKED.bytes
        assert decode(encode(request)) == request


def test_whatever_reading_brings_about_is_a_protocol_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (RecursionError(), MemoryError(), OverflowError("x" * 1000), KeyError("y"), AssertionError()):
        monkeypatch.setattr("ssd_runtime.comm.control.codec._message", lambda envelope, error=error: _raise(error))
        with pytest.raises(ProtocolError) as caught:
            decode(encode(Generate("r")))
        assert len(str(caught.value)) < 200


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_float_is_none(value: float) -> None:
    with pytest.raises(ProtocolError, match="fraction must be between 0 and 1, not"):
        decode(
            msgpack.packb([PROTOCOL_VERSION, "Progress", {"role": "draft", "rank": 0, "phase": "", "fraction": value}])
        )
