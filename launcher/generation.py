"""Requests run to their ends: what came out of them, and what they cost. Knows a client, no engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate
from ssd_runtime.speculation.types import TokenLogprob


class Generates(Protocol):
    """What is needed of a client."""

    def generate_together(self, requests: Sequence[Generate]) -> Iterator[Chunk | Finished]: ...


@dataclass(frozen=True)
class Output:
    """One output of a request; `logprobs` has one entry a token if they were asked for."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()

    def __add__(self, chunk: Chunk) -> Output:
        return Output(self.text + chunk.text, self.token_ids + chunk.token_ids, self.logprobs + chunk.logprobs)


@dataclass(frozen=True)
class Generation:
    """A finished request and its n outputs."""

    outputs: tuple[Output, ...]
    finished: Finished

    @property
    def text(self) -> str:
        """Of the first output."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first output."""
        return self.outputs[0].token_ids


def generate(client: Generates, request: Generate, on_text: Callable[[str], None] | None = None) -> Generation:
    """Run one request to its end, telling `on_text` each piece of text as it comes."""
    (generation,) = generate_together(client, [request], on_text)
    return generation


def generate_together(
    client: Generates, requests: Sequence[Generate], on_text: Callable[[str], None] | None = None
) -> list[Generation]:
    """Run requests to their ends, all at once."""
    outputs = {request.request_id: [Output()] * request.n for request in requests}
    finished: dict[str, Finished] = {}
    stream = cast(Generator[Chunk | Finished, None, None], client.generate_together(requests))
    with contextlib.closing(stream) as events:  # left early, they are cancelled now and not by the garbage collector
        for event in events:
            if isinstance(event, Finished):
                finished[event.request_id] = event
                continue
            outputs[event.request_id][event.index] += event
            if on_text is not None:
                on_text(event.text)
    assert len(finished) == len(requests), "the client's stream ended without Finished"
    return [Generation(tuple(outputs[key]), finished[key]) for key in outputs]
