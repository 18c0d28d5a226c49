"""The ranges of fields: what they allow, and that a value at fault is shown in a few characters."""

from __future__ import annotations

import math
from typing import Annotated, Any

import pytest

from ssd_runtime.bounds import AtMost, Within, shown, split


@pytest.mark.parametrize("value", [-1, 8, 2**400, math.nan, math.inf, -math.inf, 7.0000001])
def test_a_number_outside_or_no_number_is_not_allowed(value: float) -> None:
    assert not Within(0, 7).allows(value)


def test_both_ends_are_allowed_unless_the_lower_one_is_left_out() -> None:
    assert Within(0, 7).allows(0)
    assert Within(0, 7).allows(7)
    assert not Within(0.0, 1.0, above=True).allows(0.0)
    assert Within(0.0, 1.0, above=True).allows(1e-9)


@pytest.mark.parametrize(
    ("text", "fits"), [("abcd", True), ("abcde", False), ("éé", True), ("ééa", False), ("\ud800a", True)]
)
def test_text_is_measured_in_bytes(text: str, fits: bool) -> None:
    assert AtMost(4).allows(text) is fits


def test_lists_and_maps_are_measured_in_entries() -> None:
    assert AtMost(2).allows((1, 2))
    assert not AtMost(2).allows((1, 2, 3))
    assert not AtMost(0).allows({"a": 1})


def test_ranges_read_well() -> None:
    assert Within(0, 2**64 - 1).wanted == "between 0 and 2^64 - 1"
    assert Within(1, 2**31 - 1).wanted == "between 1 and 2147483647"
    assert Within(1, 3_600_000_000).wanted == "between 1 and 3600000000"
    assert Within(-(2**63), 100).wanted == "between -2^63 and 100"
    assert Within(0.0, 1.0, above=True).wanted == "above 0 and at most 1"


def test_an_annotation_is_split_into_type_and_bound() -> None:
    assert split(int) == (int, None)
    assert split(Annotated[int, "seconds"]) == (int, None)
    assert split(Annotated[int, "seconds", Within(0, 1)]) == (int, Within(0, 1))
    assert split(Annotated[tuple[int, ...], AtMost(3)]) == (tuple[int, ...], AtMost(3))


def deep() -> Any:
    value: Any = ()
    for _ in range(100_000):
        value = (value,)
    return value


def test_any_value_is_shown_in_a_few_characters() -> None:
    for value in ("x" * 10**6, b"x" * 10**6, 10**10_000, deep(), {"a": deep()}, object(), 2**63, None, math.nan):
        assert 0 < len(shown(value)) < 100
