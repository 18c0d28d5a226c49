"""The entry point of a rank whose leader forgets: `launcher.worker` with one forced miss a round where a request asks.

Used by `ops.bench.misses` only. In a batch whose request ids begin with "forced", once all of it is decoded, the leader
drops every branch that it holds of one sequence, another one each round, before it looks the outcomes up: what a draft
without that branch would have meant, but for the draft's own work, which goes on as after any miss. Each round is
written down as a line of JSON.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence as Sequences
from typing import Any
from unittest import mock

from launcher import worker
from launcher.ranks import target_rank
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.engine.speculator import Proposals
from ssd_runtime.leader.link_speculator import LinkSpeculator
from ssd_runtime.speculation.types import Outcome, Speculation

FORCED = "forced"
ROUNDS, BATCH = "SSD_BENCH_ROUNDS", "SSD_BENCH_BATCH"  # environment variables: the file of rounds; how many are "all"


class ForgetfulSpeculator(LinkSpeculator):
    """Loses what it has of one sequence in every round of a batch that asks for it."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._rounds = open(os.environ[ROUNDS], "a", buffering=1)  # noqa: SIM115 (for the life of the rank)
        self._victim: Sequence | None = None
        self._line: dict[str, Any] = {}

    def propose(self, batch: Sequences[Sequence], round: int) -> Proposals:
        run = batch[0].request.request_id.rpartition(":")[0]
        forced = run.startswith(FORCED) and len(batch) == int(os.environ[BATCH])
        place = round % len(batch) if forced else None
        self._line = {"run": run, "begun": time.monotonic(), "victim": place}
        self._victim = None if place is None else batch[place]
        proposals = super().propose(batch, round)
        self._victim = None
        self._line["hits"] = [hit is True for hit in proposals.hits]
        return proposals

    def check(self) -> None:
        """Also the first thing `propose` does: trees that have come are taken in, then those of the victim go."""
        super().check()
        if self._victim is not None:
            self._cache.admit(self._victim.sequence_id)
            # The turn that is looked up: a branch drafted just in time is of it too, and counts.
            self._cache.advance(self._victim.sequence_id, self._victim.turn - 1)

    def observe(
        self, speculations: Sequences[Speculation], outcomes: Sequences[Outcome], verify_seconds: float
    ) -> None:
        super().observe(speculations, outcomes, verify_seconds)
        self._line["tokens"] = [outcome.num_accepted + 1 for outcome in outcomes]
        self._rounds.write(json.dumps(self._line) + "\n")


if __name__ == "__main__":
    with mock.patch.object(target_rank, "LinkSpeculator", ForgetfulSpeculator):
        worker.main()
