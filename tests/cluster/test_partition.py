"""Target and draft in torchruns of their own on two hosts, and a network between them that fails."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from ssd_runtime.comm.control.client_messages import Chunk, Finished, Generate
from ssd_runtime.host import topology
from tests.cluster.hosts import Lab
from tests.cluster.runs import ask, client_on, cores_apart
from tests.process.conftest import Start
from tests.process.runs import SSD, START_S, eventually

pytestmark = pytest.mark.process
APART = cores_apart(topology.allowed_cores())
PROMPT = "the quick brown"
LONG = 400  # tokens: several seconds


def test_a_partition_in_mid_stream_costs_no_token_and_the_draft_comes_back(
    relay: Lab, run: Start, config: Path
) -> None:
    assert relay.relay is not None
    (here, there), wire = relay.hosts, relay.relay
    options = ["--config", str(config), *APART]
    target = run(*here.command(*SSD, "up", *options, "--role", "target", "--set", "serve.host=0.0.0.0"))
    address = target.until("address: ")
    assert address.startswith(f"tcp://{here.address}:")  # found without being told
    draft = run(*there.command(*SSD, "up", *options, "--role", "draft", "--target", address.removeprefix("tcp://")))
    with client_on(here, address) as client, client_on(here, address) as streaming:
        expected = ask(client, "ar", max_tokens=LONG).token_ids
        eventually(lambda: client.status().draft == "linked", START_S, "the draft links over the wire")
        assert ask(client, "ssd").finished.statistics.hits > 0

        got: list[int] = []
        request = Generate("r", prompt=PROMPT, max_tokens=LONG, ignore_eos=True, mode="ssd")
        for message in streaming.generate(request):
            if isinstance(message, Chunk):
                if not got:
                    wire.cut(True)
                got += message.token_ids
            else:
                assert isinstance(message, Finished)
        assert tuple(got) == expected
        assert wire.traffic().dropped > 0
        eventually(lambda: client.status().draft == "lost", 30, "the target has noticed that its draft is away")
        assert ask(client, "ssd", max_tokens=100).token_ids == expected[:100]

        wire.cut(False)
        eventually(lambda: client.status().draft == "linked", START_S, "the draft is back")
        again = ask(client, "ssd", max_tokens=100)
        assert again.token_ids == expected[:100]
        assert again.finished.statistics.hits > 0
    for engine in (target, draft):
        engine.process.send_signal(signal.SIGTERM)
    for engine in (target, draft):
        assert engine.exit_code(20) == 0
        engine.assert_nothing_is_left()
