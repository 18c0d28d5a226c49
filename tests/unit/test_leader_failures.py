"""What a client hears of a request whose round failed: what came before, then one failure. The next one is served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ssd_runtime.comm.control.client_messages import Chunk, Failed, Finished
from ssd_runtime.config import EngineConfig
from ssd_runtime.model.batch import ForwardBatch
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.engines import InProcess, in_process
from tests.played_leader import (
    ASKED,
    serve,
    tokenizer_fixture,  # noqa: F401
    tokens_of,
)
from tests.tiny_models import tiny_decoder


def process(fails_after: int | None = None) -> InProcess:
    """Its target raises whenever it reaches the position behind so many of the prompt's."""
    target, draft = (tiny_decoder(1, vocab_size=300) for _ in range(2))
    if fails_after is not None:
        forward = target.forward

        def delicate(batch: ForwardBatch, kv: Any) -> Any:
            if int(batch.positions_N.max()) >= fails_after:
                raise RuntimeError("a kernel failed\nwith a long story")
            return forward(batch, kv)

        target.forward = delicate  # type: ignore[method-assign]
    return in_process(target, draft, EngineConfig(max_model_len=64, max_num_seqs=3))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 4])
def test_a_failure_is_told_once_behind_what_came_before(tokenizer: Tokenizer, stream: bool, n: int) -> None:
    asked = replace(ASKED, mode="ar", stream=stream, n=n)
    whole = tokens_of(serve(process(), tokenizer, [asked]))
    length = len(tokenizer.encode("the fox"))
    *chunks, failed = serve(process(length + 4), tokenizer, [asked])
    assert failed == Failed("r", "engine", "verifying failed: RuntimeError: a kernel failed")
    assert all(isinstance(chunk, Chunk) for chunk in chunks)
    assert tokens_of(chunks) == (whole[:5] if stream else ())


def test_the_next_request_is_served(tokenizer: Tokenizer) -> None:
    length = len(tokenizer.encode("the fox"))
    short = replace(ASKED, request_id="short", mode="ar", max_tokens=3)
    long = replace(ASKED, mode="ar")
    sent = serve(process(length + 4), tokenizer, [long], [], [], [], [], [], [], [], [short])
    assert [message.request_id for message in sent if isinstance(message, Failed)] == ["r"]
    assert [message.request_id for message in sent if isinstance(message, Finished)] == ["short"]
