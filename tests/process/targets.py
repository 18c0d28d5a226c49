"""A target and its drafts in torchruns of their own, and what a client sees of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ssd_runtime.comm.control.client_messages import Status
from ssd_runtime.engine.client import Client
from tests.process.conftest import CONFIG
from tests.process.runs import SSD, Run, eventually
from tests.process.streams import Answer, Streams, answer
from tests.tiny_models import write_hf

LENGTH = 150
WAIT_S = 60.0  # a loaded machine


@dataclass
class Target:
    """A target in a group of its own, and what it says without a draft."""

    run: Run
    address: str
    config: Path
    plain: Answer

    def status(self) -> Status:
        with contextlib.closing(Client(self.address, 20.0)) as client:
            return client.status()

    def until(self, what: str, holds: Callable[[Status], bool]) -> None:
        eventually(lambda: holds(self.status()), WAIT_S, what)


def lone_target(starting: Callable[..., Run], models: Path, settings: str = "") -> Target:
    """Start one; it serves at once, before any draft is there. `settings`: more of the configuration, as TOML."""
    write_hf(models / "target", seed=1, num_layers=12)
    write_hf(models / "draft", seed=1, noise=0.02)
    config = models / "run.toml"
    config.write_text(CONFIG.format(directory=models) + "rejoin = 60.0\n" + settings)
    run = starting(*SSD, "up", "--role", "target", "--config", str(config))
    address = run.until("address: ")
    with contextlib.closing(Client(address, 20.0)) as client:
        plain = answer(client, "ar", LENGTH)
        alone = answer(client, "ssd", LENGTH)
    assert alone.tokens == plain.tokens
    assert alone.hit_rate == 0
    return Target(run, address, config, plain)


def lone_draft(starting: Callable[..., Run], target: Target) -> Run:
    """Start one in a group of its own, and wait until it is linked."""
    return lone_drafts(starting, target, 1)[0]


def lone_drafts(starting: Callable[..., Run], target: Target, count: int) -> list[Run]:
    """Start several, each in a group of its own, and wait until all are linked."""
    before = target.status().drafts_linked
    command = (*SSD, "up", "--role", "draft", "--target", target.address, "--config", str(target.config))
    runs = [starting(*command) for _ in range(count)]
    target.until(
        f"{count} more linked",
        lambda status: status.drafts_linked >= before + count or any(run.ended for run in runs),
    )
    assert not any(run.ended for run in runs), [run.err for run in runs]
    return runs


def assert_all_right(streams: Streams, target: Target) -> None:
    assert streams.failure is None
    assert streams.answers
    assert all(answer.tokens == target.plain.tokens for answer in streams.answers)
    # What the machine ran instead is not counted; a client's own clock would.
    stalls = target.status().stalls
    own = [stall for stall in stalls if stall.milliseconds - stall.delayed > 1000]
    assert not own, f"the leader held up a round: {', '.join(map(str, own))}"
    assert max(answer.longest_gap for answer in streams.answers) < 5


def until_hits_are_back(streams: Streams, before: int) -> None:
    """`before`: answers there were when the draft had come back. Without it they have no hit at all."""
    eventually(
        lambda: streams.failure is not None or any(a.hit_rate > 0.1 for a in streams.answers[before + 1 :]),
        WAIT_S,
        "hits again",
    )
