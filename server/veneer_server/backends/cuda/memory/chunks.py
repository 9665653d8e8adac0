"""Tracks which parts of a pool of chunks belong to KV blocks and to adapters. No torch.

A chunk of about 2 MB belongs to KV, to adapters, or to nobody, and changes owner on demand. KV
takes whole chunks, from the end. Adapters take pieces of some units each (fractions of a
chunk), from the beginning: each matrix is contiguous, but the pieces may lie anywhere, so that
holes are filled. Small adapters share a chunk.

(S-LoRA pages by the hidden size, which fits neither grouped queries nor MLP targets.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FREE, _ADAPTER, _KV = 0, 1, 2


class ChunkPool:
    """The owner of each unit of the pool.

    Args:
        chunks: number of chunks of the pool.
        units: number of units of a chunk.

    Attributes:
        promised: number of free chunks that are reserved for KV. Adapters cannot take them
            unless this is lowered.
    """

    def __init__(self, chunks: int, units: int, promised: int = 0) -> None:
        self.units = units
        self.promised = promised
        self._map = bytearray(chunks * units)
        """The owner of each unit."""
        self._taken = [0] * chunks
        """Units of each chunk that are not free."""
        self._whole = bytearray(chunks)
        """For each chunk 0 if all of it is free, else 1."""

    @property
    def free_chunks(self) -> int:
        """Number of chunks that are free as a whole."""
        return self._whole.count(0)

    def take_chunk(self) -> int | None:
        """Take a chunk for KV, a promised one if there is any. None if no chunk is free."""
        chunk = self._whole.rfind(0)
        if chunk < 0:
            return None
        self.promised = max(0, self.promised - 1)
        self._set(chunk * self.units, self.units, _KV)
        return chunk

    def give_chunk(self, chunk: int, *, keep: bool = True) -> None:
        """Return a chunk from KV to the pool. With ``keep`` it stays promised to KV."""
        assert self._map[chunk * self.units] == _KV, "not a chunk of KV"
        self._set(chunk * self.units, self.units, _FREE)
        self.promised += keep

    def take(self, pieces: Sequence[int]) -> list[int] | None:
        """Take memory for an adapter. Returns the first unit of each piece, or None if the
        pieces do not fit.

        Args:
            pieces: number of units of each piece.
        """
        places: list[int] = []
        after = 0
        for size in pieces:
            # After the previous piece, so that copies are long; else in any hole.
            place = self._map.find(bytes(size), after)
            if place < 0:
                place = self._map.find(bytes(size))
            if place >= 0:
                self._set(place, size, _ADAPTER)
                places.append(place)
                after = place + size
            if place < 0 or self.free_chunks < self.promised:
                self.give(zip(places, pieces, strict=False))
                return None
        return places

    def give(self, places: Iterable[tuple[int, int]]) -> None:
        """Return an adapter's pieces to the pool, given the first unit and units of each."""
        for place, size in places:
            assert self._map[place : place + size] == bytes([_ADAPTER]) * size
            self._set(place, size, _FREE)

    def chunks_of(self, places: Iterable[tuple[int, int]]) -> list[int]:
        """Return the chunks that these pieces lie in."""
        found: set[int] = set()
        for place, size in places:
            found.update(range(place // self.units, (place + size - 1) // self.units + 1))
        return sorted(found)

    def _set(self, place: int, size: int, owner: int) -> None:
        self._map[place : place + size] = bytes([owner]) * size
        change = -1 if owner == _FREE else 1
        while size:
            chunk = place // self.units
            here = min(size, (chunk + 1) * self.units - place)
            self._taken[chunk] += change * here
            self._whole[chunk] = min(1, self._taken[chunk])
            place, size = place + here, size - here


class KvPages:
    """The page of each KV block: contiguous memory for the block's K and V of all layers.

    Args:
        pages: number of pages of a chunk.

    Attributes:
        places: for each mapped block chunk * pages + the page's number in the chunk.
    """

    def __init__(self, pool: ChunkPool, pages: int) -> None:
        self._pool = pool
        self._pages = pages
        self._free: list[int] = []
        self._used: dict[int, int] = {}
        """Mapped pages of each chunk of KV."""
        self.places: dict[int, int] = {}

    def map(self, block: int) -> int | None:
        """Return the block's place; if it has none, map it. None if no chunk is free."""
        place = self.places.get(block)
        if place is not None:
            return place
        if not self._free:
            chunk = self._pool.take_chunk()
            if chunk is None:
                return None
            self._used[chunk] = 0
            first = chunk * self._pages
            self._free += range(first + self._pages - 1, first - 1, -1)
        place = self.places[block] = self._free.pop()
        self._used[place // self._pages] += 1
        return place

    def unmap(self, blocks: Iterable[int], *, keep: bool = True) -> None:
        """Unmap blocks whose contents are no longer needed. A chunk without a mapped page goes
        back to the pool; see `ChunkPool.give_chunk`."""
        for block in blocks:
            place = self.places.pop(block, None)
            if place is None:
                continue
            chunk = place // self._pages
            self._used[chunk] -= 1
            self._free.append(place)
            if not self._used[chunk]:
                del self._used[chunk]
                self._free = [p for p in self._free if p // self._pages != chunk]
                self._pool.give_chunk(chunk, keep=keep)
