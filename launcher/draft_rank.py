"""The draft's rank: loads the model, meets the target, drafts."""

from __future__ import annotations

import contextlib

from launcher import rendezvous
from launcher.rank import Rank, link_timing
from ssd_runtime.comm.control import ControlPeer
from ssd_runtime.comm.link import open_draft_link
from ssd_runtime.comm.messages import Hello, Refused, Shutdown, Welcome
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.draft.loop import DraftLoop
from ssd_runtime.errors import ConfigError
from ssd_runtime.model.catalogue import resolve
from ssd_runtime.model.tokenizer import Tokenizer


class DraftRank(Rank):
    """A rank that drafts."""

    def serve(self) -> None:
        config = self._config
        patience = config.timeouts.load + config.timeouts.handshake
        address = rendezvous.await_key(rendezvous.store(config), rendezvous.CONTROL_KEY, patience)
        tokenizer = Tokenizer.from_model(resolve(config.draft.model))
        decoder = self._load("draft", config.draft.model, config.draft.dtype)
        with contextlib.closing(ControlPeer(address)) as control:
            vocabulary = tokenizer.vocabulary().digest()
            control.send(Hello(PROTOCOL_VERSION, "draft", self._place.rank, config.digest(), vocabulary))
            answer = control.wait_for(Welcome, Refused, Shutdown, timeout_s=patience)
            if isinstance(answer, Refused):
                raise ConfigError(f"the target refused this draft: {answer.reason}")
            if not isinstance(answer, Welcome):
                return
            link = open_draft_link(answer.link, link_timing(config), **self._frames_travel_by())
            with contextlib.closing(link):
                drafter = Drafter(decoder, config.engine, config.speculation, len(tokenizer.vocabulary().tokens))
                loop = DraftLoop(drafter, control, link, self._tracer, config.timeouts.link)
                self._on_stop = loop.stop
                loop.run()
