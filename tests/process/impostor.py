"""A draft in the test's own process that joins as any other and then does as the test says."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

from ssd_runtime.comm.control.draft_messages import Hello, Welcome
from ssd_runtime.comm.control.messages import Refused
from ssd_runtime.comm.control.peer import ControlPeer
from ssd_runtime.comm.link.endpoint import DraftLink, LinkTiming
from ssd_runtime.comm.link.setup import open_draft_link
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.config import load_config
from ssd_runtime.model.text.tokenizer import Tokenizer
from tests.process.runs import eventually

WAIT_S = 60.0


def hello(config_path: Path, instance: str, digest: str | None = None) -> Hello:
    """What a draft with this configuration says first."""
    config = load_config(config_path)
    vocabulary = Tokenizer.from_model(config.draft.model).vocabulary().digest()
    return Hello(
        PROTOCOL_VERSION, "draft", 0, digest or config.digest(), vocabulary, instance, config.engine.pool_blocks
    )


@contextlib.contextmanager
def impostor(address: str, config_path: Path) -> Iterator[DraftLink]:
    """A link to the target as a draft has it."""
    with contextlib.closing(ControlPeer.connect(address)) as control:
        welcomes: list[Welcome] = []

        def knock() -> bool:
            control.send(hello(config_path, "impostor"))
            answer = control.wait_for(Welcome, Refused, timeout_s=WAIT_S)
            welcomes.extend([answer] if isinstance(answer, Welcome) else [])
            return bool(welcomes)

        eventually(knock, WAIT_S, "a place is free")
        with contextlib.closing(open_draft_link(welcomes[0].link, LinkTiming(build=WAIT_S))) as link:
            yield link


def garbage(link: DraftLink) -> None:
    """Send words that are no frame."""
    link._sending.post(torch.arange(link._encoder.num_words, dtype=torch.int64))
