"""Prompts that are computed once: sequences with the same prompt hold its whole blocks together.

Shared are only blocks that the prompt fills to the last row, and never the row of its last token, whose logits each
sequence needs: nothing is ever written into a shared block, so nothing has to be copied. Of sequences with the same
prompt at most one computes it, and only while no other has it; so a pool that counts the shared blocks of a prompt once
(engine/scheduler.py) holds them all. Knows no models and no schedule.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

from ssd_runtime.kv.table import BlockTable


class Prompt:
    """The prompt of one sequence, and how much of it others with the same one may hold too.

    Equal and hashed by its tokens; the hash is computed once.

    Args:
        tokens: all of it.
        table: of the sequence.
        unit: rows are shared in multiples of this, itself one of the table's block size; None for that size.

    Attributes:
        rows: how many of its rows are shared.
    """

    def __init__(self, tokens: tuple[int, ...], table: BlockTable, unit: int | None = None) -> None:
        self.table = table
        unit = unit or table.block_size
        self.rows = (len(tokens) - 1) // unit * unit
        self._tokens = tokens

    @cached_property
    def _hash(self) -> int:
        return hash(self._tokens)

    @property
    def blocks(self) -> int:
        """How many blocks are shared."""
        return self.rows // self.table.block_size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Prompt) and self._hash == other._hash and self._tokens == other._tokens

    def __hash__(self) -> int:
        return self._hash


def take_over(mine: Prompt, prompts: Iterable[Prompt]) -> bool:
    """Take the shared rows from another sequence that has computed them, if this one has none yet.

    Args:
        mine: whose rows are wanted.
        prompts: of all sequences at hand, `mine` among them, in the order in which they are computed.

    Returns:
        Whether the rest is to be computed by this sequence now. False: one before it computes the same prompt.
    """
    if mine.table.length or not mine.rows:
        return True
    alike = [one for one in prompts if one == mine]
    donor = next((one for one in alike if one.table.length >= mine.rows), None)
    if donor is not None:
        mine.table.take_over(donor.table, mine.rows)
    return donor is not None or alike[0] is mine
