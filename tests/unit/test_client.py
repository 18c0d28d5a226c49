"""What a client finds out by itself, before it asks the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssd_runtime.comm.control import ControlServer
from ssd_runtime.comm.messages_client import Generate
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import RequestError
from ssd_runtime.speculation.types import SamplingParams


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"params": SamplingParams(top_k=2**63)},
            "params.top_k must be between 0 and 2147483647, not 9223372036854775808",
        ),
        ({"params": SamplingParams(seed=2**64)}, "cannot encode Generate"),
        ({"n": 129}, "Generate.n must be between 1 and 128, not 129"),
        ({"prompt": "x" * (5 * 2**20 + 1)}, "Generate.prompt must have at most 5242880 bytes, not 5242881"),
    ],
)
def test_a_request_out_of_bounds_is_refused_before_it_is_sent(changes: dict[str, Any], reason: str) -> None:
    with ControlServer("127.0.0.1", 0) as server:
        client = Client(server.address, timeout_s=5.0)
        with pytest.raises(RequestError, match=reason) as caught:
            next(
                client.generate_together([Generate("well", prompt="x"), replace(Generate("r", prompt="x"), **changes)])
            )
        assert "\n" not in str(caught.value)
        client.close()
        assert server.poll(0.1) == []
