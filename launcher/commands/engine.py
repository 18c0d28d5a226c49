"""The engine that a command talks to, one that runs already or its own, and the request it has for it."""

from __future__ import annotations

import uuid
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.files import check_replaceable
from launcher.nodes import ONE_NODE, Nodes
from ssd_runtime.config import Config, Mode
from ssd_runtime.speculation.types import SamplingParams

if TYPE_CHECKING:
    from launcher.session import Session
    from ssd_runtime.comm.control.client_messages import Generate
    from ssd_runtime.host.topology import Group

CONNECT_TIMEOUT_S = 300.0  # longest silence of an engine that has answered before; long prompts take their time


def open_session(
    config: Config,
    connect: str | None,
    trace: Path | None,
    request: Generate | None,
    nodes: Nodes = ONE_NODE,
    group: Group | None = None,
) -> AbstractContextManager[Session]:
    """The engine at `connect`, or one of our own after everything that can be checked beforehand has been.

    Args:
        connect: address of an engine that runs already; None starts one.
        trace: file for the trace of our own engine.
        request: what is going to be asked of our own engine, to be checked before it starts; None if not known yet.
        nodes, group: this node's place among others, and the only role to start; without them, one node and both roles.

    Raises:
        ConfigError, RequestError: the engine or the request cannot be as asked for.
        UsageError: an option that only an engine of our own can have comes together with `connect`.
    """
    from launcher import preflight

    if connect is not None:
        if trace is not None:
            raise click.UsageError("--trace is the engine's own: give it to ssd up, not together with --connect")
        from launcher import session

        return session.connected(connect, CONNECT_TIMEOUT_S)
    check_replaceable(trace)
    preflight.check_engine(config, nodes, group)
    if request is not None:
        preflight.check_request(request, config)
    from launcher import screen, session  # after the checks, which are to answer at once
    from launcher.torchrun import Launch

    return session.started(Launch(config, trace=trace, nodes=nodes, group=group), screen.loading)


def request_for(
    prompt: str, raw: bool, max_tokens: int, stop: tuple[str, ...], mode: Mode | None, params: SamplingParams
) -> Generate:
    """A request with a fresh name; `raw` leaves the prompt as it is, otherwise it is one message of a chat."""
    from ssd_runtime.comm.control.client_messages import ChatMessage, Generate

    request = Generate(request_id=uuid.uuid4().hex, params=params, max_tokens=max_tokens, stop=stop, mode=mode)
    if raw:
        return replace(request, prompt=prompt)
    return replace(request, messages=(ChatMessage("user", prompt),))
