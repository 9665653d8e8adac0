"""Prefix cache index: content keys of KV blocks, and LRU order over unused blocks.

Only full blocks have a key. Keys form a hash chain: the key of a block covers its own
tokens and, through its parent's key, everything before them, the weights that
computed them and the isolation scope. So equal keys mean equal K and V (up to
rounding, which depends on the rest of the batch), even if adapters are replaced,
evicted or renamed in between. The idea is vLLM's automatic prefix caching.

No torch, no sequences: `BlockManager` counts references and drives this cache.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Container, Iterator, Sequence
from hashlib import sha256

from veneer_server.engine.integrity import in_slices


def extend_chain(
    keys: list[bytes],
    count: int,
    *,
    scope: str,
    digest: str | None,
    tokens: Sequence[int],
    block_size: int,
) -> None:
    """Append to ``keys`` until it holds the keys of the first ``count`` full blocks.

    Args:
        scope: prefixes are shared within a scope only.
        digest: weights digest of the adapter; None is the base model.
        tokens: the sequence's tokens, at least ``count * block_size``.
    """
    while len(keys) < count:
        begin = len(keys) * block_size
        block = array("q", tokens[begin : begin + block_size]).tobytes()
        parent = keys[-1] if keys else _root(scope, digest)
        keys.append(sha256(_framed(parent) + _framed(block)).digest())


def _root(scope: str, digest: str | None) -> bytes:
    weights = "base" if digest is None else f"adapter {digest}"
    return sha256(_framed(scope.encode()) + _framed(weights.encode())).digest()


def _framed(part: bytes) -> bytes:
    """Return the part prefixed with its length, so that no two lists of parts encode to the
    same bytes."""
    return len(part).to_bytes(8, "little") + part


class PrefixCache:
    """Keys of blocks, and the order in which unused blocks are evicted."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()
        """Blocks with a key that no sequence refers to, least recently used first."""

    @property
    def idle(self) -> int:
        """Number of blocks that can be evicted."""
        return len(self._idle)

    def find(self, key: bytes) -> int | None:
        """Return the block with this content, used or idle, or None."""
        return self._block_of.get(key)

    def insert(self, key: bytes, block: int) -> None:
        """Remember a full block. If several have the same key, `find` returns the first."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def wake(self, block: int) -> None:
        """Mark an idle block as in use again."""
        del self._idle[block]

    def keep(self, block: int) -> bool:
        """Keep a block that is no longer in use, as idle; False if it has no key."""
        if block not in self._key_of:
            return False
        self._idle[block] = None
        return True

    def give_up(self) -> int:
        """Evict the least recently used idle block, which may then be overwritten."""
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """Remove the block's key, so that it is no longer found; a no-op if it has none."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def clear(self) -> list[int]:
        """Remove all keys; return the blocks that were idle, which are free now."""
        idle = list(self._idle)
        self._block_of.clear()
        self._key_of.clear()
        self._idle.clear()
        return idle

    def integrity(self, used: Container[int]) -> Iterator[None]:
        """Check that keys and blocks agree, and that a block with a key is idle unless it is
        used. Runs in slices, see the module `integrity`."""
        assert len(self._block_of) == len(self._key_of), "keys and blocks differ"
        idle = 0
        for part in in_slices(self._key_of.items()):
            for block, key in part:
                assert self._block_of.get(key) == block, "keys and blocks differ"
                kept = block in self._idle
                assert kept != (block in used), "an unused block with a key is not idle"
                idle += kept
            yield
        assert idle == len(self._idle), "an idle block has no key"

    def idle_blocks(self) -> Iterator[int]:
        """Blocks that can be evicted, in eviction order."""
        return iter(self._idle)
