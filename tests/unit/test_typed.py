"""Values of strangers as records: what fits, and that a refusal says where and what is wanted in a short line."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
from msgspec import Meta

from ssd_runtime.typed import Unfit, shown, typed


@dataclass(frozen=True)
class Leg:
    shoe: Annotated[int, Meta(ge=0, le=7)] = 0
    side: Literal["left", "right"] = "left"


@dataclass(frozen=True)
class Animal:
    name: Annotated[str, Meta(max_length=4)]
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    legs: Annotated[tuple[Leg, ...], Meta(max_length=2)] = ()
    first: Leg = Leg()
    age: Annotated[int, Meta(ge=0, le=99)] | None = None
    fur: Annotated[dict[Annotated[str, Meta(max_length=4)], Leg], Meta(max_length=1)] = dataclasses.field(
        default_factory=dict
    )


def test_what_fits_becomes_the_record_with_lists_as_tuples_and_whole_numbers_as_floats() -> None:
    animal = typed({"name": "éééé", "weight": 3, "legs": [{"shoe": 7}, {"side": "right"}], "age": None}, Animal)
    assert animal == Animal("éééé", 3.0, (Leg(7), Leg(side="right")))
    assert type(animal.weight) is float


@pytest.mark.parametrize("number", [-1, 8, 2**63, 10**400, -(10**400), math.nan, math.inf, True, 7.0, "7", None, [7]])
def test_a_number_outside_its_range_or_none_at_all_is_refused(number: Any) -> None:
    with pytest.raises(Unfit, match=r"^first.shoe must be (between 0 and 7|int), not "):
        typed({"name": "cat", "first": {"shoe": number}}, Animal)


@pytest.mark.parametrize("number", [0, -1.5, 1000.5, 10**400, math.nan, math.inf, -math.inf, True, "1"])
def test_neither_nan_nor_infinity_nor_an_end_that_is_left_out_is_within_a_range(number: Any) -> None:
    with pytest.raises(Unfit, match=r"^weight must be (above 0 and at most 1000|float), not "):
        typed({"name": "cat", "weight": number}, Animal)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "name is missing"),
        ({"name": "horse"}, "name must have at most 4 characters, not 5"),
        ({"name": "cat", "first": {"side": "up"}}, "first.side must be one of left, right, not 'up'"),
        (
            {"name": "cat", "first": {"side": "x - at `$.name`"}},
            "first.side must be one of left, right, not 'x - at `$.na",
        ),
        ({"name": "cat", "first": 3}, "first must be a map of fields, not 3"),
        ({"name": "cat", "legs": [{}, {"shoe": 8}]}, "legs[1].shoe must be between 0 and 7, not 8"),
        ({"name": "cat", "legs": [{}] * 3}, "legs must have at most 2 entries, not 3"),
        ({"name": "cat", "legs": {}}, "legs must be a list, not a map of 0"),
        ({"name": "cat", "age": 100}, "age must be between 0 and 99, not 100"),
        ({"name": "cat", "fur": {"white": {}}}, "fur has a key that does not fit: expected str of length <= 4"),
        (
            {"name": "cat", "fur": {"red": {"shoe": 8}}},
            "fur[...].shoe has a value that does not fit: expected int <=",
        ),
        ({"name": "cat", "fur": {"a": {}, "b": {}}}, "fur must have at most 1 entries, not 2"),
        ({"name": "cat", "wieght": 1}, "wieght is unknown; did you mean 'weight'?"),
        ({"name": "cat", "tail": 1}, "tail is unknown; known: name, weight, legs, first, age, fur"),
        ({"name": "cat", "first": {"sock": 1}}, "first.sock is unknown; known: shoe, side"),
        ({"name": "cat", "legs": [{}, {"hsoe": 1}]}, "legs[1].hsoe is unknown; did you mean 'shoe'?"),
        ({"name": "cat", "fur": {"red": {"sock": 1}}}, "fur['red'].sock is unknown; known: shoe, side"),
        ({3: 1, "name": "cat"}, " has a key that does not fit: expected str"),
        ([], " must be a map of fields, not a list of 0"),
    ],
)
def test_a_refusal_says_where_and_what_is_wanted(fields: Any, said: str) -> None:
    with pytest.raises(Unfit) as refused:
        typed(fields, Animal)
    assert str(refused.value).startswith(said)


def deep() -> Any:
    value: Any = ()
    for _ in range(100_000):
        value = (value,)
    return value


def test_any_value_is_shown_in_a_few_characters() -> None:
    for value in ("x" * 10**6, b"x" * 10**6, 10**10_000, deep(), {"a": deep()}, object(), 2**63, None, math.nan):
        assert 0 < len(shown(value)) < 100
