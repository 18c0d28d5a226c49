"""Which sequences are decoded now. Knows blocks and counts; no model, no link.

A sequence is admitted when the pool has room for all it may ever need, so nothing is preempted and no two sequences
can wait for each other.
"""

from __future__ import annotations

from collections import deque

from ssd_runtime.config import EngineConfig
from ssd_runtime.engine.sequence import Sequence
from ssd_runtime.errors import RequestError


class Scheduler:
    """First come, first served.

    Args:
        config: sizes of the engine.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._free = config.pool_blocks
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

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to the running ones while there is room; returns those that moved."""
        admitted = []
        while self.waiting and len(self.running) < self._config.max_num_seqs:
            if self._blocks(self.waiting[0]) > self._free:
                break
            sequence = self.waiting.popleft()
            self._free -= self._blocks(sequence)
            self.running.append(sequence)
            admitted.append(sequence)
        return admitted

    def prefilling(self) -> Sequence | None:
        """The sequence whose prompt is computed next."""
        return next((sequence for sequence in self.running if not sequence.prefilled), None)

    def next_batch(self) -> list[Sequence]:
        """The sequences of the next verification."""
        return [sequence for sequence in self.running if sequence.prefilled]

    def remove(self, sequence: Sequence) -> None:
        """A sequence is over, wherever it was."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self._free += self._blocks(sequence)
        sequence.table.release()

    def _blocks(self, sequence: Sequence) -> int:
        """Most blocks the sequence can ever hold; a speculation never reaches past its last token."""
        return -(-(sequence.num_prompt + sequence.max_tokens) // self._config.block_size)
