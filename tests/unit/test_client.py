"""A client of an engine, over real sockets: what it finds out by itself, and what it hears of a server that answers as
the test wants.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from ssd_runtime.comm.control.client_messages import Generate, Status
from ssd_runtime.comm.control.messages import Message, Refused, Shutdown
from ssd_runtime.comm.control.server import ControlServer
from ssd_runtime.engine.client import Client
from ssd_runtime.errors import PeerLost, RequestError, SsdError
from ssd_runtime.speculation.types import SamplingParams

READY = Status("ready", "none", "target", "draft", "ar")
STOPPING = Status("stopping", "none", "target", "draft", "ar")
Answers = Callable[[Message], list[Message]]


class Server:
    """Answers each message as told, in a thread.

    Attributes:
        heard: every message, in order.
    """

    def __init__(self, answers: Answers) -> None:
        self.heard: list[Message] = []
        self._answers = answers
        self._server = ControlServer.bind("127.0.0.1", 0)
        self.address = self._server.address
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.is_set():
            for identity, message in self._server.poll(0.02):
                self.heard.append(message)
                for answer in self._answers(message):
                    self._server.send(identity, answer)

    def close(self) -> None:
        self._over.set()
        self._thread.join(10)
        self._server.close()


@contextlib.contextmanager
def serving(answers: Answers) -> Iterator[Server]:
    with contextlib.closing(Server(answers)) as server:
        yield server


def test_a_shutdown_is_heard_though_the_client_closes_at_once() -> None:
    with serving(lambda message: [STOPPING]) as server:
        for i in range(30):
            client = Client(server.address, 10.0)
            client.shutdown(str(i))
            client.close()
        assert server.heard == [Shutdown("asked by a client", str(i)) for i in range(30)]


def test_a_shutdown_that_nobody_answers_is_an_error() -> None:
    with serving(lambda message: []) as server, contextlib.closing(Client(server.address, 10.0)) as client:
        with pytest.raises(PeerLost, match="no Status or Refused within"):
            client.shutdown(timeout_s=0.2)
        assert len(server.heard) == 1


def test_a_shutdown_that_is_refused_is_an_error_with_the_reason() -> None:
    with (
        serving(lambda message: [Refused("with serve.allow_shutdown")]) as server,
        contextlib.closing(Client(server.address, 10.0)) as client,
        pytest.raises(SsdError, match=r"does not end: with serve\.allow_shutdown"),
    ):
        client.shutdown()


def test_an_earlier_status_is_no_answer_to_a_shutdown() -> None:
    with (
        serving(lambda message: [READY]) as server,
        contextlib.closing(Client(server.address, 10.0)) as client,
        pytest.raises(PeerLost),
    ):
        client.shutdown(timeout_s=0.2)


def test_requests_with_one_id_are_refused_before_they_are_sent() -> None:
    with serving(lambda message: []) as server, contextlib.closing(Client(server.address, 10.0)) as client:
        with pytest.raises(RequestError, match="the same request_id"):
            list(client.generate_together([Generate("r", prompt="a"), Generate("r", prompt="b")]))
        with pytest.raises(PeerLost):
            client.shutdown(timeout_s=0.2)
        assert [type(message) for message in server.heard] == [Shutdown]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"params": SamplingParams(top_k=2**63)},
            "params.top_k must be between 0 and 2147483647, not 9223372036854775808",
        ),
        ({"params": SamplingParams(seed=2**64)}, "cannot encode Generate"),
        ({"n": 129}, "Generate.n must be between 1 and 128, not 129"),
        ({"prompt": "x" * (5 * 2**20 + 1)}, "Generate.prompt must have at most 5242880 characters, not 5242881"),
    ],
)
def test_a_request_out_of_bounds_is_refused_before_it_is_sent(changes: dict[str, Any], reason: str) -> None:
    with ControlServer.bind("127.0.0.1", 0) as server:
        client = Client(server.address, timeout_s=5.0)
        with pytest.raises(RequestError, match=reason) as caught:
            next(
                client.generate_together([Generate("well", prompt="x"), replace(Generate("r", prompt="x"), **changes)])
            )
        assert "\n" not in str(caught.value)
        client.close()
        assert server.poll(0.1) == []
