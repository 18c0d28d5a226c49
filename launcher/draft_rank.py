"""The draft's rank: loads the model, meets the target, drafts."""

from __future__ import annotations

import secrets

from launcher import rendezvous
from launcher.rank import Rank, link_timing
from ssd_runtime.comm.link import open_draft_link
from ssd_runtime.comm.messages import Hello
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.draft.membership import Membership, Patience
from ssd_runtime.model.catalogue import resolve
from ssd_runtime.model.tokenizer import Tokenizer


class DraftRank(Rank):
    """A rank that drafts."""

    def serve(self) -> None:
        config, timeouts = self._config, self._config.timeouts
        first = timeouts.load + timeouts.handshake
        group, number = self._place.group, self._place.rank
        if group is not None and group.target is not None:
            address, number = group.target, self._place.num_targets + self._place.rank
        else:
            address = rendezvous.await_key(rendezvous.store(config), rendezvous.CONTROL_KEY, first)
        tokenizer = Tokenizer.from_model(resolve(config.draft.model))
        decoder = self._load("draft", config.draft.model, config.draft.dtype)
        vocabulary = tokenizer.vocabulary()
        digest, instance = vocabulary.digest(), secrets.token_hex(8)
        hello = Hello(PROTOCOL_VERSION, "draft", number, config.digest(), digest, instance)
        membership = Membership(
            address,
            hello,
            Drafter(decoder, config.engine, config.speculation, len(vocabulary.tokens)),
            lambda at: open_draft_link(at, link_timing(config), **self._frames_travel_by()),
            Patience(first, timeouts.rejoin, timeouts.link),
            lambda: None,
            self._tracer,
        )
        self._on_stop = membership.stop
        membership.run()
