"""Messages that are made to be dear to read: as large as may be, up to what else limits them, or without an end."""

from __future__ import annotations

import contextlib
import struct
import subprocess
import sys
from collections.abc import Iterator

import msgpack

from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.comm.control.codec import ASKED, MOST_PAIRS, Limits, encode
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.speculation.types import MOST_TOKENS, SamplingParams

SERVED = ASKED.for_prompts(2048)  # what an engine of so many tokens reads


def listed(unit: bytes, count: int) -> bytes:
    """A list that has one thing so many times."""
    return b"\xdd" + struct.pack(">I", count) + unit * count


def filled(unit: bytes) -> bytes:
    """A list that fills a message with one thing."""
    return listed(unit, (ASKED.bytes - 5) // len(unit))


def just_read(unit: bytes, limits: Limits) -> bytes:
    """A list of lists that have together as many of one thing as is read."""
    lists = 64
    each = min(limits.entries // lists - 1, ASKED.bytes // lists // len(unit) - 1)
    return listed(listed(unit, each), lists)


def _just_read(limits: Limits) -> dict[str, bytes]:
    maps = min(limits.containers // 2, limits.entries // (MOST_PAIRS + 2))
    pairs = b"\xde" + struct.pack(">H", MOST_PAIRS) + b"".join(b"\xa4%04x\x01" % i for i in range(MOST_PAIRS))
    return {
        f"integers within {limits.entries}": just_read(b"\xd0\x90", limits),
        f"floats within {limits.entries}": just_read(b"\xcb" + b"\x3f" * 8, limits),
        f"texts within {limits.entries}": just_read(b"\xa2\xc3\xa9", limits),
        f"maps within {limits.entries}": listed(pairs, min(maps, ASKED.bytes // len(pairs) - 1)),
        f"lists within {limits.containers}": listed(b"\x91\x01", limits.containers - 2),
        f"empty maps within {limits.containers}": listed(b"\x80", limits.containers - 2),
    }


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
    **_just_read(ASKED),
    **_just_read(SERVED),
}

ENDLESS = """
import socket, sys, threading
host, port, part, connections = sys.argv[1], *map(int, sys.argv[2:])
greeting = b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00" + b"NULL".ljust(20, b"\\0") + bytes(32)
ready = b"\\x05READY\\x0bSocket-Type\\x00\\x00\\x00\\x06DEALER"
one_more = b"\\x03" + part.to_bytes(8, "big") + bytes(part)  # flags: another part follows; a length of eight bytes
parts = one_more * max(1, 2**20 // len(one_more))

def send():
    with socket.create_connection((host, port)) as opened:
        opened.sendall(greeting + b"\\x04" + bytes([len(ready)]) + ready)
        for said in (64, 2):  # the other's greeting, and that it is ready: before, nothing may be sent
            opened.recv(said, socket.MSG_WAITALL)
        while True:
            opened.sendall(parts)

for _ in range(connections):
    threading.Thread(target=send).start()
"""


@contextlib.contextmanager
def endless(address: str, part: int, connections: int = 1) -> Iterator[None]:
    """A process that sends one message without an end over each connection: parts of so many bytes, never the last."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    command = [sys.executable, "-c", ENDLESS, host, port, str(part), str(connections)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()
