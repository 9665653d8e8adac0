"""KV cache blocks: a free list, reference counts and the prefix cache. No torch.

A block is free, used by one sequence or more, or idle: used by none, but kept
because it holds a prefix that another sequence may need. Idle blocks count as
free, and are evicted when the free list is empty. A sequence writes only to
blocks that it allocated itself and that are not full; only full blocks are shared.

If every layer has an attention window, a running sequence gives back the blocks that no layer
reaches any more; full ones go into the prefix cache. A prefix can then be used if the blocks of
the window before its end are cached, even if earlier blocks are gone. The idea is vLLM's.

Block 0 is never allocated: block tables point to it for padding, and in place of blocks that
were given back.
"""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterator
from itertools import chain

from veneer_server.engine.integrity import in_slices
from veneer_server.engine.scheduling.prefix_cache import PrefixCache, extend_chain
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.step.reach import first_reached, most_blocks


class BlockManager:
    """Owns ``num_blocks`` blocks of ``block_size`` tokens; one of them is padding.

    Args:
        prefix_cache: whether sequences may share blocks at all.
        window: most tokens that any layer attends to; None if a layer attends to all.
        chunk: most tokens of one sequence that a step computes; needed with a window.

    Attributes:
        cache: which blocks hold which prefixes; only changed here.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        prefix_cache: bool = True,
        window: int | None = None,
        chunk: int = 1,
    ) -> None:
        if num_blocks < 2:
            raise ValueError("the KV cache needs at least 2 blocks")
        self.block_size = block_size
        self._window = window
        self._chunk = chunk
        self.total = num_blocks - 1
        self._enabled = prefix_cache
        self.cache = PrefixCache()
        self._free = list(range(num_blocks - 1, 0, -1))
        self._references = [0] * num_blocks

    @property
    def free(self) -> int:
        """Blocks that `grow` can allocate, including idle ones."""
        return len(self._free) + self.cache.idle

    @property
    def used(self) -> int:
        """Blocks that sequences refer to."""
        return self.total - self.free

    @property
    def cached(self) -> int:
        """Idle blocks: no sequence uses them, but they hold a prefix."""
        return self.cache.idle

    def blocks_for(self, tokens: int) -> int:
        """Blocks needed for this many tokens."""
        return -(-tokens // self.block_size)

    def most_blocks(self, tokens: int) -> int:
        """Most blocks that a sequence of this many tokens holds at a time."""
        return most_blocks(tokens, self._window, self._chunk, self.block_size)

    @property
    def window_blocks(self) -> int | None:
        """Most blocks that any sequence holds at a time; None if a layer attends to all."""
        return None if self._window is None else self.most_blocks(sys.maxsize)

    def longest(self, context: int) -> int:
        """Most tokens of a sequence: ``context``, or fewer if the cache can never hold that."""
        fits = self.can_ever_hold(context)
        return context if fits else min(context, self.total * self.block_size)

    def can_ever_hold(self, tokens: int) -> bool:
        return self.most_blocks(tokens) <= self.total

    def adopt(self, sequence: Sequence) -> int:
        """Give a sequence that has no blocks yet the cached blocks of its prefix.

        Returns:
            The number of tokens in those blocks: a multiple of the block size, and fewer than
            the sequence has, since the logits of its last token are still needed.
        """
        assert not sequence.blocks, "the sequence already has blocks"
        sequence.blocks = self._cached(sequence)
        sequence.published = len(sequence.blocks)
        computed = sequence.published * self.block_size
        sequence.given_back = self._first_reached(computed)
        for block in sequence.blocks[sequence.given_back :]:
            if not self._references[block]:
                self.cache.wake(block)
            self._references[block] += 1
        return computed

    def cached_prefix(self, sequence: Sequence) -> int:
        """Tokens that `adopt` would find now."""
        return len(self._cached(sequence)) * self.block_size

    def _cached(self, sequence: Sequence) -> array[int]:
        """Return the cached blocks of the longest prefix that can be used, with 0 in place of
        blocks that no layer reaches from the end of that prefix."""
        found = array("q")
        if not self.shares(sequence):
            return found
        keys = self._keys(sequence, (len(sequence.tokens) - 1) // self.block_size)
        if self._window is None:
            for key in keys:
                block = self.cache.find(key)
                if block is None:
                    break
                found.append(block)
            return found
        found.extend([0] * len(keys))
        end = at = len(keys)
        while at > self._first_reached(end * self.block_size):
            at -= 1
            block = self.cache.find(keys[at])
            if block is None:
                end = at  # the prefix must end before it
            else:
                found[at] = block
        return found[:end]

    def _first_reached(self, computed: int) -> int:
        return first_reached(computed, self._window, self.block_size)

    def common_prefix(self, sequence: Sequence, other: Sequence) -> int:
        """Number of leading tokens that ``sequence`` has in common with the running sequence
        ``other`` and may share the K and V of; 0 if ``other`` adds nothing to the cached
        blocks."""
        start = other.published * self.block_size
        may_share = (
            self.shares(sequence)
            and self._publishes(other)
            and sequence.digest == other.digest
            and sequence.request.cache_scope == other.request.cache_scope
        )
        if not may_share or start >= len(sequence.tokens):
            return 0
        # Compare keys first, then the tokens after them: these are few, except in a prefill.
        mine, theirs = (self._keys(s, other.published)[-1:] for s in (sequence, other))
        end = min(len(sequence.tokens), len(other.tokens))
        differ = (i for i in range(start, end) if sequence.tokens[i] != other.tokens[i])
        return next(differ, end) if mine == theirs else 0

    def grow(self, sequence: Sequence, tokens: int, *, spare: int = 0) -> bool:
        """Allocate blocks for the first ``tokens`` tokens of ``sequence``. Allocate none and
        return False if fewer than ``spare`` blocks would be left free."""
        missing = self.blocks_for(tokens) - len(sequence.blocks)
        if missing > 0 and missing + spare > self.free:
            return False
        for _ in range(missing):
            block = self._free.pop() if self._free else self.cache.give_up()
            self._references[block] = 1
            sequence.blocks.append(block)
        return True

    def trim(self, sequence: Sequence, tokens: int) -> None:
        """Release the blocks behind the first ``tokens`` tokens, which only a refused draft
        needed. They are the sequence's own: what is behind its end is never published."""
        for _ in range(len(sequence.blocks) - self.blocks_for(tokens)):
            self._drop(sequence.blocks.pop())

    def publish(self, sequence: Sequence) -> None:
        """Let other sequences find the blocks that are full of computed tokens.

        Call this once the step that computed them has ended with finite logits."""
        full = sequence.computed // self.block_size
        if not self._publishes(sequence) or full <= sequence.published:
            return
        keys = self._keys(sequence, full)
        for index in range(sequence.published, full):
            self.cache.insert(keys[index], sequence.blocks[index])
        sequence.published = full

    def give_back(self, sequence: Sequence) -> None:
        """Release the blocks that no layer will reach again. Call this after `publish`."""
        if self._window is None:
            return
        end = self._first_reached(sequence.computed)
        for index in range(sequence.given_back, end):
            self._drop(sequence.blocks[index])
            sequence.blocks[index] = 0
        sequence.given_back = end

    def forget(self, sequence: Sequence) -> None:
        """Drop this sequence's blocks from the prefix cache: their content is not valid."""
        for block in sequence.blocks[sequence.given_back :]:
            self.cache.forget(block)

    def reset_cache(self) -> None:
        """Empty the prefix cache. Sequences keep the blocks that they use."""
        self._free.extend(self.cache.clear())

    def release(self, sequence: Sequence) -> None:
        """Release all blocks of ``sequence``; idempotent."""
        # In reverse: the tail of a prefix must be evicted before its head, without which
        # the tail could not be found.
        for block in reversed(sequence.blocks[sequence.given_back :]):
            self._drop(block)
        del sequence.blocks[:]
        sequence.published = sequence.given_back = 0

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        if not self._references[block] and not self.cache.keep(block):
            self._free.append(block)

    def shares(self, sequence: Sequence) -> bool:
        """Whether the sequence may use blocks cached by others, and publishes its own."""
        # Prompt log-probabilities need the whole prompt computed; it can still be published.
        return self._publishes(sequence) and not sequence.request.prompt_logprobs

    def _publishes(self, sequence: Sequence) -> bool:
        return self._enabled and sequence.request.use_prefix_cache

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the first ``count`` blocks. They never change, since tokens are only
        appended."""
        extend_chain(
            sequence.block_keys,
            count,
            scope=sequence.request.cache_scope,
            digest=sequence.digest,
            tokens=sequence.tokens,
            block_size=self.block_size,
        )
        return sequence.block_keys[:count]

    def check_unused(self) -> None:
        """Assert that no block is in use; call when there is no sequence. O(1)."""
        assert not self.used, f"{self.used} KV blocks are in use without a sequence"

    def integrity(self, owners: list[Sequence]) -> Iterator[None]:
        """Check that every block is free, idle or in use, and that reference counts are
        right. Runs in slices, see the module `integrity`."""
        counted = Counter(
            block for sequence in owners for block in sequence.blocks[sequence.given_back :]
        )
        yield from self.cache.integrity(counted)
        seen = bytearray(self.total + 1)
        seen[0] = 1
        for blocks in in_slices(chain(self._free, self.cache.idle_blocks(), counted)):
            for block in blocks:
                assert not seen[block], f"KV block {block} is in two places, or is padding"
                seen[block] = 1
            yield
        assert all(seen), f"{seen.count(0)} KV blocks are neither free, idle nor used"
        for counts in in_slices(enumerate(self._references)):
            for block, references in counts:
                assert references == counted[block], f"references to KV block {block} differ"
            yield
        for sequence in owners:
            assert sequence.given_back <= self._first_reached(sequence.computed), (
                f"sequence {sequence.id} gave back a block that a layer reaches"
            )
            assert not any(sequence.blocks[: sequence.given_back]), (
                f"sequence {sequence.id} refers to a block that it gave back"
            )
            writable = sequence.blocks[sequence.computed // self.block_size :]
            assert all(counted[block] == 1 for block in writable), (
                f"sequence {sequence.id} would write to a shared block"
            )
