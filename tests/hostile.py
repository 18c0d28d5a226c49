"""Messages that are made to be dear to read, each as large as may be."""

from __future__ import annotations

import struct

import msgpack

from ssd_runtime.comm.codec import ASKED, encode
from ssd_runtime.comm.messages_client import Generate
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.speculation.types import MOST_TOKENS, SamplingParams


def filled(unit: bytes, each: int = 1) -> bytes:
    """A list that fills a message with one thing."""
    count = (ASKED.bytes - 5) // len(unit)
    return b"\xdd" + struct.pack(">I", each * count) + unit * count


HOSTILE = {
    "integers": filled(b"\x01"),
    "one byte integers": filled(b"\xd0\x90"),
    "floats": filled(b"\xcb" + b"\x3f" * 8),
    "texts": filled(b"\xa2\xc3\xa9"),
    "empty lists": filled(b"\x90"),
    "empty maps": filled(b"\x80"),
    "pairs": filled(b"\x92\x01\x01"),
    "maps": filled(b"\x81\xa0\x01"),
    "nested lists": filled(b"\x91" * 500 + b"\x01"),
    "nested to the end": b"\x91" * ASKED.bytes,
    "extensions": filled(b"\xd4\x01\x01"),
    "timestamps": filled(b"\xd6\xff\x01\x01\x01\x01"),
    "lengths of what is not there": b"\xdd\x00\x5f\xff\xff" * 500 + bytes(ASKED.bytes - 2500),
    "maps of what is not there": b"\xdf\x00\x2f\xff\xff\xa0" * 500 + bytes(ASKED.bytes - 3000),
    "one text": b"\xdb" + struct.pack(">I", ASKED.bytes - 5) + b"a" * (ASKED.bytes - 6) + b"\xff",
    "one map": b"\xdf" + struct.pack(">I", 850_000) + b"".join(b"\xa5%05x\x01" % i for i in range(850_000)),
    "a request of numbers": encode(Generate("r", token_ids=(2**31 - 1,) * MOST_TOKENS)),
    "a request of biases": encode(Generate("r", params=SamplingParams(logit_bias=((2**31 - 1, -1.5),) * 2**12))),
    "numbers that are none": msgpack.packb(
        [PROTOCOL_VERSION, "Generate", {"request_id": "r", "token_ids": [1.0] * 650_000}]
    ),
}
