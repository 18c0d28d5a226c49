"""Addresses are written and read in one way, and mean the same to whoever listens and whoever comes."""

from __future__ import annotations

import contextlib
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssd_runtime.comm import hosts

HOSTS = st.one_of(
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).map(str),
    st.from_regex(r"[a-z][a-z0-9.-]{0,30}", fullmatch=True),
)


class Refused(Exception):
    """What the property allows besides an address."""


def split(text: str) -> tuple[str, int]:
    try:
        return hosts.split(text)
    except ValueError as error:
        if "HOST" not in str(error):
            raise
        raise Refused from error


@given(HOSTS, st.integers(1, 65535), st.sampled_from(["", "tcp://"]))
def test_what_is_written_is_read_again(host: str, port: int, scheme: str) -> None:
    assert hosts.split(scheme + hosts.join(host, port)) == (host, port)


@given(st.text(alphabet="[]:./a1 \u0661", max_size=12) | st.text(max_size=40))
def test_what_is_read_is_an_address_or_refused_with_the_way_to_write_one(text: str) -> None:
    with contextlib.suppress(Refused):
        host, port = split(text)
        assert host
        assert 0 < port < 65536
        assert split(hosts.join(host, port)) == (host, port)


@pytest.mark.parametrize(
    "text", ["", "host", ":1", "host:", "host:0", "host:65536", "a/b:1", "host:١", "[::1]", "[]:1"]
)
def test_half_an_address_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        hosts.split(text)


@pytest.mark.parametrize(
    ("text", "how"), [("::1:7333", "needs brackets"), ("[::1:7333", r"\[HOST\]:PORT"), ("::1]:7", "HOST")]
)
def test_an_ipv6_address_has_brackets(text: str, how: str) -> None:
    with pytest.raises(ValueError, match=how):
        hosts.split(text)


def test_a_name_with_addresses_of_both_kinds_means_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {
        ("both", socket.AF_INET): "10.9.8.7",
        ("both", socket.AF_UNSPEC): "fd00::1",
        ("new", socket.AF_UNSPEC): "fd00::2",
    }

    def lookup(host: str, port: int, family: int = socket.AF_UNSPEC, type: int = 0) -> list[object]:
        if (host, family) not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = known[host, family]
        return [(socket.AF_INET6 if ":" in found else socket.AF_INET, type, 0, "", (found, port))]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    assert hosts.resolve("both", 1) == (socket.AF_INET, ("10.9.8.7", 1))
    assert hosts.resolve("new", 1) == (socket.AF_INET6, ("fd00::2", 1))
    assert [hosts.is_ipv6(host) for host in ("both", "new", "unknown")] == [False, True, False]


def test_loopback_and_ones_own_are_told_in_both_kinds() -> None:
    assert [hosts.is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert not any(hosts.is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.1", "2001:db8::1", "no.such.invalid"))
    assert hosts.is_own("127.0.0.1")
    assert not any(hosts.is_own(host) for host in ("0.0.0.0", "::", "192.0.2.77", "2001:db8::1"))


def test_a_listener_is_at_one_address_alone() -> None:
    with hosts.listen("127.0.0.2", 0, 5) as listener:
        host, port = listener.getsockname()
        assert host == "127.0.0.2"
        with socket.socket() as elsewhere:
            assert elsewhere.connect_ex(("127.0.0.1", port)) != 0
