"""Coupling "rejection" between real ranks: the probabilities that were sampled from arrive as they were sent."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.generation import Generation, generate
from launcher.session import started
from launcher.torchrun import Launch
from ssd_runtime.comm.control.client_messages import Generate
from ssd_runtime.config import Mode, load_config
from ssd_runtime.engine.client import Client
from ssd_runtime.speculation.types import SamplingParams
from tests.process.runs import PLAIN
from tests.process.test_serving import unseen

pytestmark = pytest.mark.process
LENGTH = 96


@pytest.fixture(scope="module")
def client(config: Path, models: Path) -> Iterator[Client]:
    """Of a target that is its own draft."""
    overrides = (
        f"draft.model={models / 'target'}",
        "speculation.coupling=rejection",
        "speculation.top_m=32",
    )
    with pytest.MonkeyPatch.context() as environment:
        for name, value in PLAIN.items():
            environment.setenv(name, value)
        launch = Launch(load_config(config, overrides))
        with started(launch, unseen) as session, contextlib.closing(Client(session.address, 30.0)) as connected:
            yield connected


def answer(client: Client, mode: Mode, params: SamplingParams) -> Generation:
    request = Generate(
        uuid.uuid4().hex, prompt="the quick brown", max_tokens=LENGTH, ignore_eos=True, mode=mode, params=params
    )
    return generate(client, request)


@pytest.mark.parametrize("mode", ["sd", "ssd"])
def test_a_draft_that_samples_from_the_targets_distribution_is_always_accepted(client: Client, mode: Mode) -> None:
    # min(1, p/q) is 1 for every token if q arrives as it was; top_k keeps all of p within the draft's top_m.
    # How many tokens a draft offers is a matter of its speed: so ask until there were enough.
    offered = accepted = 0
    for seed in range(7, 27):
        params = SamplingParams(temperature=1.0, top_k=16, seed=seed)
        found = answer(client, mode, params)
        assert len(found.token_ids) == LENGTH
        offered += found.finished.statistics.num_draft_tokens
        accepted += found.finished.statistics.num_accepted_tokens
        if seed == 7:
            assert found.token_ids != answer(client, "ar", params).token_ids  # which shared noise would give
        if offered >= LENGTH:
            break
    assert offered >= LENGTH
    assert accepted == offered


def test_greedy_text_is_that_of_plain_decoding(client: Client) -> None:
    plain = answer(client, "ar", SamplingParams())
    for mode in ("sd", "ssd"):
        assert answer(client, mode, SamplingParams()).token_ids == plain.token_ids  # type: ignore[arg-type]
