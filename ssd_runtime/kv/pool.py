"""The block allocator of the paged KV cache: which blocks are free, who holds the others. Knows no tensors."""

from __future__ import annotations


class OutOfBlocks(Exception):
    """The pool is exhausted. The scheduler reserves before it admits, so only a broken reservation gets here."""


class BlockAllocator:
    """Hands out block numbers 0..num_blocks-1 with reference counts. Lowest numbers first."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks

    @property
    def num_blocks(self) -> int:
        return len(self._references)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self) -> int:
        """A free block, held once by the caller."""
        if not self._free:
            raise OutOfBlocks(f"all {self.num_blocks} KV blocks are in use")
        block = self._free.pop()
        self._references[block] = 1
        return block

    def retain(self, block: int) -> None:
        """One more holder of a block in use."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One holder less; the last one gives the block back."""
        assert self._references[block] > 0, f"block {block} is free"
        self._references[block] -= 1
        if self._references[block] == 0:
            self._free.append(block)

    def references(self, block: int) -> int:
        return self._references[block]
