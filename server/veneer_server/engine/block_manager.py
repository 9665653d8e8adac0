"""KV cache blocks as a free list. No torch: it hands out numbers.

Block 0 is never handed out: padded places in a block table point at it.
"""

from __future__ import annotations

from veneer_server.engine.sequence import Sequence

__all__ = ["BlockManager"]


class BlockManager:
    """Owns ``num_blocks`` blocks of ``block_size`` tokens, one of them padding."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 2:
            raise ValueError("the KV cache needs at least 2 blocks")
        self.block_size = block_size
        self.total = num_blocks - 1
        self._free = list(range(num_blocks - 1, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def used(self) -> int:
        return self.total - len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def can_ever_hold(self, tokens: int) -> bool:
        return self.blocks_for(tokens) <= self.total

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give ``sequence`` blocks for its first ``tokens`` tokens; all or nothing."""
        missing = self.blocks_for(tokens) - len(sequence.blocks)
        if missing > len(self._free):
            return False
        for _ in range(missing):
            sequence.blocks.append(self._free.pop())
        return True

    def release(self, sequence: Sequence) -> None:
        """Take back all blocks of ``sequence``; harmless to repeat."""
        self._free.extend(reversed(sequence.blocks))
        sequence.blocks.clear()

    def check_integrity(self, owners: list[Sequence]) -> None:
        """Every block is free or owned once; raises AssertionError."""
        owned = [block for sequence in owners for block in sequence.blocks]
        everything = sorted(self._free + owned)
        assert everything == list(range(1, self.total + 1)), (
            f"KV blocks: {len(self._free)} free + {len(owned)} owned of {self.total}"
        )
