"""The draft's rank: loads the model, meets the target, drafts."""

from __future__ import annotations

import logging
import secrets

from launcher.ranks import rendezvous
from launcher.ranks.rank import Rank, forget_loading, link_timing
from ssd_runtime import logs
from ssd_runtime.comm.control.draft_messages import Hello
from ssd_runtime.comm.control.launcher_messages import Joined
from ssd_runtime.comm.link.setup import open_draft_link
from ssd_runtime.comm.protocol import PROTOCOL_VERSION
from ssd_runtime.draft.drafter import Drafter
from ssd_runtime.draft.membership import JoinTimeouts, Membership
from ssd_runtime.host.cores import crowded, listed
from ssd_runtime.model.files.catalogue import resolve
from ssd_runtime.model.text.tokenizer import Tokenizer

log = logging.getLogger("ssd.draft")


class DraftRank(Rank):
    """A rank that drafts."""

    def serve(self) -> None:
        config, timeouts = self._config, self._config.timeouts
        first = timeouts.load + timeouts.handshake
        group, number = self._place.group, self._place.rank
        if group is not None and group.target is not None:
            address, number = group.target, 0
        else:
            address = rendezvous.await_key(rendezvous.store(config), rendezvous.CONTROL_KEY, first)
        tokenizer = Tokenizer.from_model(resolve(config.draft.model))
        decoder = self._models.load("draft")
        engine = self._models.engine_of(self._models.blocks_that_fit())
        with self._models.making_pool(engine.pool_blocks):
            drafter = Drafter(decoder, engine, config.speculation, len(tokenizer.vocabulary().tokens))
        digest, instance = tokenizer.vocabulary().digest(), secrets.token_hex(8)
        hello = Hello(PROTOCOL_VERSION, "draft", number, config.digest(), digest, instance, engine.pool_blocks)
        membership = Membership(
            address,
            hello,
            drafter,
            lambda at: open_draft_link(at, link_timing(config), self._place.link_gpu),
            JoinTimeouts(first, timeouts.rejoin, timeouts.link),
            self._known_as,
            self._tracer,
        )
        self._on_stop = membership.stop
        forget_loading()
        membership.run()

    def _known_as(self, number: int) -> None:
        """A draft of a torchrun of its own goes by the number that the target has given it."""
        if self._place.group is None:
            return
        logs.setup("draft", number)
        self._tracer.process, self._tracer.sort_index = f"draft rank {number}", number
        log.info("on cores %s", listed(self._cores) or "that the system chooses")
        if self._claims.crowded:
            log.warning("%s", crowded(number, self._cores))
        self._announcer.say(Joined(number, self._cores, self._claims.crowded))
