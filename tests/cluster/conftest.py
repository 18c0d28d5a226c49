"""Two hosts for a test; without root, ip or TUN the test skips and says what is missing."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

from tests.cluster import hosts
from tests.process.conftest import config, models, run  # noqa: F401 - fixtures


@functools.cache
def reason_for_none() -> str | None:
    return hosts.reason_for_none()


@pytest.fixture
def cable() -> Iterator[hosts.Lab]:
    """Two hosts joined by a veth pair."""
    if reason := reason_for_none():
        pytest.skip(reason)
    with hosts.joined_by_a_cable() as lab:
        yield lab


@pytest.fixture
def relay() -> Iterator[hosts.Lab]:
    """Two hosts joined by a relay."""
    if reason := reason_for_none():
        pytest.skip(reason)
    with hosts.joined_by_a_relay() as lab:
        yield lab
