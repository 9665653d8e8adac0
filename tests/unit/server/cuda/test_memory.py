"""Chunks that KV and adapters share, and fences: random histories on a fake device.

`python -m tests.gpu.engine` has the long form.
"""

from __future__ import annotations

import pytest
from veneer_server.backends.cuda.memory.chunks import ChunkPool, KvPages

from tests.gpu.engine.histories import BUGS, caught, check


def test_nothing_is_read_that_is_not_there_yet_or_no_longer() -> None:
    for history in range(100):
        check(f"suite/{history}")


@pytest.mark.parametrize("number", range(len(BUGS)), ids=[bug[0] for bug in BUGS])
def test_a_planted_bug_is_noticed(number: int) -> None:
    assert caught(number, "suite", 400)


def test_a_chunk_moves_from_kv_to_an_adapter_and_back() -> None:
    pool = ChunkPool(2, 4, promised=2)
    pages = KvPages(pool, 2)
    assert pages.map(0) is not None
    assert pool.take([3]) is None, "the other chunk is promised to KV"
    pool.promised = 0
    assert pool.take([3]) == [0]
    assert [pages.map(block) for block in (1, 2)] == [3, None]
    pool.give([(0, 3)])
    assert pages.map(2) == 0
    pages.unmap([0, 1, 2], keep=False)
    assert pool.take([2, 6]) == [0, 2], "a piece may be longer than a chunk"


def test_pieces_fill_holes_and_stay_in_one_piece_each() -> None:
    pool = ChunkPool(2, 4)
    first = pool.take([2, 3])
    assert first == [0, 2]
    assert pool.take([3]) == [5]
    pool.give([(2, 3)])
    assert pool.take([4]) is None
    assert pool.take([2, 1]) == [2, 4]
    assert pool.free_chunks == 0
