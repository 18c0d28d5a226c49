"""The relay between two hosts: `relay.py NAMESPACE NAMESPACE`. Makes a TUN device `eth0` in each, carries packets.

Reads orders as lines of JSON from standard input ({"delay": seconds}, {"cut": true}, {}), answers each with the traffic
so far, ends with its input. Starts in a moment: imports nothing but the standard library.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import json
import os
import select
import struct
import sys
import time

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
LARGEST_PACKET = 65535


def main() -> None:
    try:
        devices = [open_device(namespace) for namespace in sys.argv[1:3]]
    except OSError as error:
        answer({"error": str(error)})
        return
    answer({})
    carry(devices)


def carry(devices: list[int]) -> None:
    """Until standard input ends."""
    on_the_way: tuple[collections.deque, collections.deque] = (collections.deque(), collections.deque())
    sent, dropped = [0, 0], 0
    delay, cut = 0.0, False
    orders = b""
    while True:
        now = time.monotonic()
        for side in (0, 1):
            while on_the_way[side] and on_the_way[side][0][0] <= now:
                write(devices[1 - side], on_the_way[side].popleft()[1])
        due = [queue[0][0] for queue in on_the_way if queue]
        readable, _, _ = select.select([*devices, 0], [], [], max(0.0, min(due) - now) if due else None)
        now = time.monotonic()
        for side, device in enumerate(devices):
            if device not in readable:
                continue
            packet = os.read(device, LARGEST_PACKET)
            sent[side] += len(packet)
            if cut:
                dropped += 1
            elif delay or on_the_way[side]:
                on_the_way[side].append((now + delay, packet))
            else:
                write(devices[1 - side], packet)
        if 0 in readable:
            read = os.read(0, 65536)
            if not read:
                return
            *lines, orders = (orders + read).split(b"\n")
            for line in lines:
                order = json.loads(line)
                delay, cut = order.get("delay", delay), order.get("cut", cut)
                if cut:
                    dropped += sum(len(queue) for queue in on_the_way)
                    for queue in on_the_way:
                        queue.clear()
                answer({"sent": sent, "dropped": dropped})


def write(device: int, packet: bytes) -> None:
    with contextlib.suppress(OSError):  # the device is not up yet, or its host is full: networks lose packets
        os.write(device, packet)


def answer(said: dict) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def open_device(namespace: str) -> int:
    """A TUN device `eth0` in the namespace, open; it exists as long as it is open."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(namespace) as file:
        if libc.setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}")
    device = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
    return device


if __name__ == "__main__":
    main()
