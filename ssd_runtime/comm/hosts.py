"""Addresses of hosts as the kernel and the resolver see them. Sends nothing, imports no torch."""

from __future__ import annotations

import ipaddress
import socket


def own_address(host: str, port: int) -> str:
    """Which of this machine's addresses leads to `host`: nothing is sent, the kernel only looks up the route."""
    family, kind, protocol, _, there = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(there)
        return str(probe.getsockname()[0])


def is_loopback(host: str) -> bool:
    """Whether `host` is an address that only processes of this machine reach."""
    try:
        return ipaddress.ip_address(socket.gethostbyname(host)).is_loopback
    except (OSError, ValueError):
        return False
