"""The other ranks of a tensor-parallel target: load a part of the model, replay what the leader computes."""

from __future__ import annotations

import logging

from launcher.ranks import rendezvous
from launcher.ranks.rank import Rank, forget_loading
from ssd_runtime.leader.replay import Follower

log = logging.getLogger("ssd.follower")


class FollowerRank(Rank):
    """A target rank that is not the leader. It leaves when the leader tells it to, or is gone."""

    def serve(self) -> None:
        config = self._config
        with rendezvous.target_joined(config, self._place, rendezvous.store(config)) as group:
            part = self._models.load("target", group.tensors)
            self._models.engine_of(group.all_loaded(self._models.blocks_that_fit()))
            forget_loading()
            self._on_stop = self._wait_for_leader
            Follower(part, group.frames, config.engine.block_size).run()
        log.info("leaving: told to")

    def _wait_for_leader(self, reason: str) -> None:
        """Whoever asks one rank to leave asks the leader too, which first ends what it has announced."""
        log.info("%s: leaving with the leader", reason)
