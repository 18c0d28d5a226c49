"""Addresses of hosts, IPv4 and IPv6: how they are written, what they mean to the kernel and the resolver, which this
host has, listening at one. Sends nothing, imports no torch.

Where a name has addresses of both kinds, its IPv4 one is meant, by whoever listens and by whoever comes.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from collections.abc import Iterator
from typing import Any

WILDCARDS = ("0.0.0.0", "::", "*")  # all addresses of a host, and so none to tell others
SIOCGIFADDR = 0x8915  # netdevice(7)
ELSEWHERE = ("192.0.2.1", "2001:db8::1")  # no host has these (RFC 5737, 3849): the way there is the default route


def split(address: str) -> tuple[str, int]:
    """Host and port of `[tcp://]host:port`, where an IPv6 host has brackets, which are taken off.

    Raises:
        ValueError: it is not written so; says how.
    """
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if (
        not colon
        or not bare(host)
        or "/" in host
        or not (port.isascii() and port.isdigit())
        or not 0 < int(port) < 65536
    ):
        raise ValueError("expected HOST:PORT")
    if host.startswith("[") != host.endswith("]"):
        raise ValueError("expected [HOST]:PORT for an IPv6 address")
    if ":" in host and not host.startswith("["):
        raise ValueError("an IPv6 address needs brackets: [HOST]:PORT")
    return bare(host), int(port)


def join(host: str, port: int) -> str:
    """The opposite of `split`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def bare(host: str) -> str:
    """A host without the brackets that an IPv6 address may have."""
    return host[1:-1] if host.startswith("[") and host.endswith("]") else host


def resolve(host: str, port: int, kind: int = socket.SOCK_STREAM) -> tuple[socket.AddressFamily, Any]:
    """Family and address for `bind` and `connect`; raises OSError for a host that has none."""
    host = "0.0.0.0" if host == "*" else bare(host)
    try:
        found = socket.getaddrinfo(host, port, socket.AF_INET, kind)
    except socket.gaierror:
        found = socket.getaddrinfo(host, port, type=kind)
    return found[0][0], found[0][4]


def is_ipv6(host: str) -> bool:
    """Whether a host has an IPv6 address alone; a name that is not known (so far) has not."""
    try:
        return resolve(host, 0)[0] == socket.AF_INET6
    except OSError:
        return False


def own_address(host: str, port: int) -> str:
    """Which of this machine's addresses leads to `host`: nothing is sent, the kernel only looks up the route."""
    family, there = resolve(host, port, socket.SOCK_DGRAM)
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def is_own(host: str) -> bool:
    """Whether `host`, an address or a name, is of this host; a wildcard is not."""
    try:
        family, there = resolve(host, 0)
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind(there)
    except OSError:
        return False
    return there[0] not in WILDCARDS


def is_loopback(host: str) -> bool:
    """Whether `host` is an address that only processes of this machine reach."""
    try:
        return ipaddress.ip_address(resolve(host, 0)[1][0]).is_loopback
    except (OSError, ValueError):
        return False


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


def listen(host: str, port: int, backlog: int) -> socket.socket:
    """A TCP socket that listens at `host` and nowhere else; port 0 takes a free one. Raises OSError."""
    family, there = resolve(host, port)
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(there)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener
