"""Which sequences are decoded now. Knows blocks and counts; no model, no link.

A sequence is admitted when the pool has room for all it may ever need, so nothing is preempted and no two sequences
can wait for each other. Blocks that sequences with the same prompt share are needed once, while any of them runs.
"""

from __future__ import annotations

from collections import Counter, deque

from ssd_runtime.config import EngineConfig
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.errors import RequestError
from ssd_runtime.kv.sharing import Prompt, take_over


class Scheduler:
    """First come, first served.

    Args:
        config: sizes of the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._free = config.pool_blocks
        self._holders: Counter[Prompt] = Counter()  # running sequences by what they share
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; raises RequestError if it could never be admitted."""
        needed = self._blocks(sequence)
        if needed > self._config.pool_blocks:
            raise RequestError(
                f"the request needs {needed} KV blocks and the pool has {self._config.pool_blocks}: "
                "ask for fewer tokens or raise engine.num_blocks"
            )
        self.waiting.append(sequence)

    @property
    def num_queued(self) -> int:
        """How many wait beyond those that there is a place for."""
        return max(0, len(self.waiting) + len(self.running) - self._config.max_num_seqs)

    @property
    def num_tokens_waiting(self) -> int:
        """Tokens that those who wait came with; what the outputs of one request share is counted once."""
        return sum(one.request.num_tokens for one in self.waiting if one.request.index == 0)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to the running ones while there is room; returns those that moved."""
        admitted = []
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            needed = self._own_blocks(self.waiting[0])
            if needed > self._free:
                break
            sequence = self.waiting.popleft()
            self._free -= needed
            self._holders[sequence.prompt] += 1
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def prefilling(self) -> Sequence | None:
        """The sequence whose prompt is computed next."""
        return next((sequence for sequence in self.running if not sequence.prefilled), None)

    def share_prompt(self, sequence: Sequence) -> None:
        """Before the prompt of that sequence is computed: take over what another has computed of the same one."""
        computes = take_over(sequence.prompt, (one.prompt for one in self.running))
        assert computes, "prompts are computed in the order of admission"

    def next_batch(self) -> list[Sequence]:
        """The sequences of the next verification."""
        return [sequence for sequence in self.running if sequence.prefilled]

    def remove(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it was."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._holders[sequence.prompt] -= 1
            self._free += self._own_blocks(sequence)
            if not self._holders[sequence.prompt]:
                del self._holders[sequence.prompt]
        sequence.table.release()

    def _own_blocks(self, sequence: Sequence) -> int:
        """Most blocks it can ever hold beside those that a running sequence holds anyway; itself not counted."""
        return self._blocks(sequence) - (sequence.prompt.blocks if self._holders[sequence.prompt] else 0)

    def _blocks(self, sequence: Sequence) -> int:
        """Most blocks the sequence can ever hold; a speculation never reaches past its last token."""
        return -(-(sequence.num_prompt + sequence.max_tokens) // self._config.block_size)
