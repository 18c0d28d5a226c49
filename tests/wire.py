"""Every message that may travel, by the annotations of its fields: values for hypothesis, and whether one may."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from typing import Any, Literal

from hypothesis import strategies as st
from msgspec import Meta

from ssd_runtime.speculation.types import MOST_SEED

UNBOUNDED = Meta()
BARE: dict[Any, st.SearchStrategy[Any]] = {bool: st.booleans(), type(None): st.none()}


def messages_of(cls: type) -> st.SearchStrategy[Any]:
    return st.builds(cls, **{name: values_of(hint) for name, hint in hints_of(cls).items()})


@functools.cache
def hints_of(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def split(hint: Any) -> tuple[Any, Meta]:
    """An annotation as its bare type and its bounds."""
    return typing.get_args(hint)[:2] if typing.get_origin(hint) is typing.Annotated else (hint, UNBOUNDED)


def is_range(bound: Meta) -> bool:
    """Whether it has both ends. That of a seed is what a message can carry."""
    return (bound.ge is not None or bound.gt is not None) and (bound.le is not None or bound == Meta(ge=0))


def ends(bound: Meta) -> tuple[Any, Any]:
    """The least and the most that a range allows, or with `gt` the number above which it begins."""
    assert is_range(bound), "a number without bounds"
    return bound.gt if bound.ge is None else bound.ge, MOST_SEED if bound.le is None else bound.le


def allows(bound: Meta, value: Any) -> bool:
    if bound.max_length is not None:
        return len(value) <= bound.max_length
    least, most = ends(bound)
    return least <= value <= most and value != bound.gt


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    bare, bound = split(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if dataclasses.is_dataclass(bare):
        return messages_of(typing.cast(type, bare))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return st.tuples(*map(values_of, arguments))
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=_size(bound, 4)).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=_size(bound, 3))
    if origin in (types.UnionType, typing.Union):
        return st.one_of(*map(values_of, arguments))
    if bare is str:
        return st.text(max_size=_size(bound, 20))
    if bare in BARE:
        return BARE[bare]
    least, most = ends(bound)
    return st.integers(least, most) if bare is int else st.floats(least, most, exclude_min=bound.gt is not None)


def _size(bound: Meta, wanted: int) -> int:
    assert bound.max_length is not None, "a size without bounds"
    return min(wanted, bound.max_length)


def check(value: Any, hint: Any) -> None:
    """Assert that a decoded value is of its type and within its bounds."""
    bare, bound = split(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if bound is not UNBOUNDED:
        assert allows(bound, value), (value, hint)
    if dataclasses.is_dataclass(bare):
        assert type(value) is bare
        for name, field in hints_of(typing.cast(type, bare)).items():
            check(getattr(value, name), field)
    elif origin is Literal:
        assert value in arguments
    elif origin in (types.UnionType, typing.Union):
        if value is not None:
            check(value, arguments[0])
    elif origin is tuple:
        assert type(value) is tuple
        for inner, element in zip(
            arguments if arguments[-1] is not Ellipsis else [arguments[0]] * len(value), value, strict=True
        ):
            check(element, inner)
    elif origin is dict:
        for key, element in value.items():
            check(key, arguments[0])
            check(element, arguments[1])
    else:
        assert type(value) is bare, (value, hint)
