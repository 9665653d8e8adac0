"""One pool of chunks for KV blocks and adapters: who has which. No torch.

A chunk, some 2 MB, belongs to KV, to adapters, or to nobody, and moves between them by
demand. KV takes whole chunks, from the end. An adapter takes places of a few units (fractions
of a chunk) each, from the beginning: each of its matrices is in one piece, but the pieces may
lie anywhere, so that holes are filled. Small adapters share a chunk.

(S-LoRA pages by the hidden size, which fits neither grouped queries nor MLP targets.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_FREE, _ADAPTER, _KV = 0, 1, 2


class ChunkPool:
    """Who has which units.

    Args:
        chunks: of the pool.
        units: of a chunk.

    Attributes:
        promised: chunks that are kept for KV although it has not taken them yet. An adapter
            gets none of them; lowered, they are adapters' to take.
    """

    def __init__(self, chunks: int, units: int, promised: int = 0) -> None:
        self.units = units
        self.promised = promised
        self._map = bytearray(chunks * units)
        """Who has each unit."""
        self._taken = [0] * chunks
        """Units of each chunk that are not free."""
        self._whole = bytearray(chunks)
        """0: a chunk is free as a whole."""

    @property
    def free_chunks(self) -> int:
        """Chunks that nobody has a part of."""
        return self._whole.count(0)

    def take_chunk(self) -> int | None:
        """A chunk for KV, a promised one if there is any; None if all are taken."""
        chunk = self._whole.rfind(0)
        if chunk < 0:
            return None
        self.promised = max(0, self.promised - 1)
        self._set(chunk * self.units, self.units, _KV)
        return chunk

    def give_chunk(self, chunk: int, *, keep: bool = True) -> None:
        """KV returns a chunk; with ``keep`` it stays promised to KV."""
        assert self._map[chunk * self.units] == _KV, "not a chunk of KV"
        self._set(chunk * self.units, self.units, _FREE)
        self.promised += keep

    def take(self, pieces: Sequence[int]) -> list[int] | None:
        """Places for an adapter's pieces: the first unit of each; None if they do not fit.

        Args:
            pieces: units of each.
        """
        places: list[int] = []
        after = 0
        for size in pieces:
            # Behind the piece before it, so that copies are long; else in any hole.
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
        """An adapter returns pieces: first unit and units of each."""
        for place, size in places:
            assert self._map[place : place + size] == bytes([_ADAPTER]) * size
            self._set(place, size, _FREE)

    def chunks_of(self, places: Iterable[tuple[int, int]]) -> list[int]:
        """The chunks that these pieces lie in."""
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
    """Where KV blocks lie: a page is a block's K and V of all layers, in one piece.

    Args:
        pages: of a chunk.

    Attributes:
        places: of each mapped block: chunk * pages + the page's number in it.
    """

    def __init__(self, pool: ChunkPool, pages: int) -> None:
        self._pool = pool
        self._pages = pages
        self._free: list[int] = []
        self._used: dict[int, int] = {}
        """Mapped pages of each chunk of KV."""
        self.places: dict[int, int] = {}

    def map(self, block: int) -> int | None:
        """The block's place, a new one if it has none; None if no chunk is free."""
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
        """These blocks have nothing worth keeping; a chunk without a mapped page goes back to
        the pool, see `ChunkPool.give_chunk`."""
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
