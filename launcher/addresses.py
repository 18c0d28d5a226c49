"""The addresses of this host, and which of them to tell others. Listens nowhere, sends nothing."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
from collections.abc import Iterator

from ssd_runtime.comm.hosts import is_loopback, own_address

SIOCGIFADDR = 0x8915  # netdevice(7)
ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # no host has these (RFC 5737, 3849): the way there is the default route


def interfaces() -> Iterator[tuple[str, str]]:
    """Name and IPv4 address of each interface that has one, in the kernel's order."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            yield name, socket.inet_ntoa(answer[20:24])


def address_of_host() -> str:
    """Where others most likely reach this host: the address of the default route, or without one the first that is not
    loopback, or loopback if there is no other."""
    for host in ELSEWHERE:
        with contextlib.suppress(OSError):
            return own_address(host, 9)
    return next((address for _, address in interfaces() if not is_loopback(address)), "127.0.0.1")
