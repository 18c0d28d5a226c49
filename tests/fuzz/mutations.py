"""Valid messages and frames, and what becomes of them on the way. A `random.Random` chooses, so a seed says it all."""

from __future__ import annotations

import dataclasses
import random
import struct
import types
import typing
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import msgpack
import torch
from torch import Tensor

from ssd_runtime.comm.link.frames import HEADER
from tests.wire import ends, hints_of, split

EDGES = (-(2**63), -(2**31), -2, -1, 0, 1, 7, 255, 2**31 - 1, 2**31, 2**48, 2**48 + 1, 2**62, 2**63 - 1)
LEAVES = (*EDGES, 2**63, 2**64 - 1, 1e-300, 1e300, float("nan"), float("inf"), "", "x" * 5000, b"", None, True, [], {})
TOKENS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc9\x00",
    b"\xcf" + b"\xff" * 8, b"\xcb" + b"\xff" * 8, b"\xd4\x01\x01", b"\xd6\xff\x00\x00\x00\x00", b"\xc1", b"\x91" * 2000,
    b"\x81\xa1x" * 700,
)  # fmt: skip


def value_of(hint: Any, chance: random.Random) -> Any:
    """A value that the annotation allows, now and then one at its edge."""
    bare, bound = split(hint)
    origin, arguments = typing.get_origin(bare), typing.get_args(bare)
    if dataclasses.is_dataclass(bare):
        return typing.cast(type, bare)(**{n: value_of(h, chance) for n, h in hints_of(typing.cast(type, bare)).items()})
    if origin is Literal:
        return chance.choice(arguments)
    if origin in (types.UnionType, typing.Union):
        return value_of(chance.choice(arguments), chance)
    if origin is tuple and arguments[-1] is not Ellipsis:
        return tuple(value_of(item, chance) for item in arguments)
    if origin is tuple:
        assert bound.max_length is not None
        return tuple(value_of(arguments[0], chance) for _ in range(min(bound.max_length, chance.randrange(4))))
    if origin is dict:
        return {value_of(arguments[0], chance): value_of(arguments[1], chance) for _ in range(chance.randrange(3))}
    if bare is str:
        return "".join(chance.choices("abc é€😀\n\0", k=chance.randrange(8)))
    if bare in (bool, types.NoneType):
        return chance.random() < 0.5 if bare is bool else None
    least, most = ends(bound)
    edge = chance.random()
    if edge < 0.2 and bound.gt is None:
        return bare(least)
    if edge < 0.4:
        return bare(most)
    return chance.randint(least, min(most, least + 300)) if bare is int else chance.uniform(least, most)


def mutated_message(corpus: Sequence[bytes], chance: random.Random) -> bytes:
    """One of the corpus: as it is, with other values in it, or with other bytes."""
    data = chance.choice(corpus)
    kind = chance.random()
    if kind < 0.2:
        return data
    if kind < 0.6:
        return _with_other_values(data, chance)
    return _with_other_bytes(data, corpus, chance)


def _with_other_values(data: bytes, chance: random.Random) -> bytes:
    tree = msgpack.unpackb(data)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place: Any = tree
        while True:
            key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or chance.random() < 0.1:
                break
            place = inner
        change = chance.random()
        if change < 0.1 and isinstance(place, dict):
            del place[key]
        elif change < 0.2 and isinstance(place, list) and place is not tree:
            place *= chance.choice((0, 2, 300))
        else:
            place[key] = chance.choice(LEAVES)
        if not place:
            break
    return typing.cast(bytes, msgpack.packb(tree))


def _with_other_bytes(data: bytes, corpus: Sequence[bytes], chance: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(raw) + 1)
        change = chance.randrange(5)
        if change == 0 and at < len(raw):
            raw[at] ^= 1 << chance.randrange(8)
        elif change == 1:
            raw[at:at] = chance.choice(TOKENS)
        elif change == 2:
            raw[at:] = chance.choice(corpus)[chance.randrange(len(raw) + 1) :]
        elif change == 3:
            del raw[at : at + chance.choice((1, 2, 8, 1000))]
        else:
            raw[at : at + 8] = struct.pack(">q", chance.choice(EDGES))
    return bytes(raw)


def mutated_words(words: Tensor, chance: random.Random) -> Tensor:
    """The words of a frame, some of them others; mostly with the checksum that they have."""
    words = words.clone()
    for _ in range(chance.choice((0, 1, 1, 1, 2, 5))):
        at = chance.randrange(len(words)) if chance.random() < 0.5 else chance.randrange(min(len(words), HEADER + 20))
        change = chance.randrange(4)
        if change == 0:
            words[at] = chance.choice(EDGES)
        elif change == 1:
            words[at] ^= 1 << chance.randrange(63)
        elif change == 2:
            words[at] += chance.choice((-1, 1))
        else:
            words[at] = words[chance.randrange(len(words))]
    if chance.random() < 0.02:
        return words[: chance.randrange(len(words))] if chance.random() < 0.5 else words.to(torch.int32)
    if chance.random() < 0.95:
        words[HEADER - 1] = zlib.crc32(words[HEADER:].numpy())
    return words
