"""The memory of an adapter: complete in both processes, in huge pages, released."""

from __future__ import annotations

import mmap
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from veneer_server.adapters.pages import (
    MappedSegment,
    make_ready,
    map_pages,
    memory,
    next_range,
    place,
)

MB = 1 << 20
pytestmark = pytest.mark.skipif(os.name != "posix", reason="of Linux")


@pytest.fixture
def fd() -> Iterator[int]:
    made = memory(5 * MB + 70_000)
    yield made
    os.close(made)


def mapped(fd: int, what: str) -> int:
    """kB of all mappings of this memory that are so (smaps)."""
    try:
        text = Path("/proc/self/smaps").read_text("utf-8")
    except OSError:
        pytest.skip("no /proc")
    found, inode = 0, str(os.fstat(fd).st_ino)
    for part in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        head = part.splitlines()[0]
        if "veneer-adapter" in head and head.split()[4] == inode:
            found += int(re.search(rf"^{what}: *(\d+) kB", part, re.M)[1])  # type: ignore[index]
    return found


def test_what_one_writes_the_other_reads(fd: int) -> None:
    size = 5 * MB + 70_000
    ready = [0]
    while ready[-1] < size:
        ready.append(make_ready(fd, size, ready[-1]))
    assert ready == sorted(set(ready)), "each call makes some"
    assert ready[-1] == size
    one, other = map_pages(fd, size), map_pages(fd, size)
    assert (len(one), bytes(one)) == (size, bytes(size))
    for at in (0, 1, 2 * MB - 1, 2 * MB, 4 * MB + 3, size - 1):
        one[at] = at % 251 + 1
    assert all(other[at] == at % 251 + 1 for at in (0, 1, 2 * MB - 1, 2 * MB, size - 1))


def test_memory_that_was_made_ready_for_less_serves_for_more(fd: int) -> None:
    """A loader keeps memory of the last adapter's size, whose last page is not whole."""
    odd, size = 3 * MB + 1234, 5 * MB
    ready = 0
    while ready < odd:
        ready = make_ready(fd, odd, ready)
    assert ready == odd
    while ready < size:
        ready = make_ready(fd, size, ready)
    assert bytes(map_pages(fd, size)) == bytes(size)


def test_its_pages_are_large_where_linux_has_them(fd: int) -> None:
    first = make_ready(fd, 5 * MB, 0)
    if first < 2 * MB:
        pytest.skip("this kernel collapses none")
    make_ready(fd, 5 * MB, first)
    view = map_pages(fd, 5 * MB)
    assert mapped(fd, "ShmemPmdMapped") == 4 << 10
    del view
    assert mapped(fd, "Size") == 0, "given back with the last reference"


def test_what_cannot_be_mapped_is_a_memory_error() -> None:
    with pytest.raises(MemoryError):
        map_pages(-1, MB)


@pytest.mark.parametrize("size", [8 << 10, MB, 2 * MB, 9_768_960, 300 * MB])
def test_adapters_begin_apart_within_the_memory_they_have(size: int) -> None:
    """So that the same layers of many do not share the sets of a cache, at no cost in large
    pages and hardly any in small ones."""
    places = [place(number, size) for number in range(64)]
    assert all(at % mmap.PAGESIZE == 0 for at in places)
    assert max(places) <= size // 64
    assert all(next_range(at + size) == next_range(size) for at in places)


@pytest.mark.skipif(
    sys.platform != "linux" or mmap.PAGESIZE != 4096, reason="ranges of Linux, pages of 4 kB"
)
@pytest.mark.parametrize(
    ("rank", "least"), [(1, 3), (2, 5), (4, 8), (8, 8), (16, 8), (32, 8), (64, 8)]
)
def test_eight_neighbours_begin_at_as_many_places_of_a_cache_as_there_are(
    rank: int, least: int
) -> None:
    """Adapters of the bundled base."""
    size = 610_560 * rank
    for first in (0, 3, 12_345):
        places = {place(first + number, size) % (128 << 10) for number in range(8)}
        assert len(places) == least


def test_a_place_within_a_large_page_has_large_pages_too(fd: int) -> None:
    begin, size = 5 * mmap.PAGESIZE, 5 * MB
    first = make_ready(fd, begin + size, 0)
    if first < 2 * MB:
        pytest.skip("this kernel collapses none")
    make_ready(fd, begin + size, first)
    view = map_pages(fd, size, begin)
    view[0], view[-1] = 3, 4
    assert mapped(fd, "ShmemPmdMapped") >= 2 << 10
    del view
    assert mapped(fd, "Size") == 0
    whole = map_pages(fd, begin + size)
    assert (whole[begin], whole[begin + size - 1]) == (3, 4)


SPACE = 64 * MB


@pytest.fixture
def file() -> Iterator[int]:
    """A descriptor of memory whose first 20 MB are ready."""
    made = memory(SPACE)
    ready = 0
    while ready < 20 * MB:
        ready = make_ready(made, SPACE, ready)
    yield made
    os.close(made)


def used(file: int) -> int:
    """MB of memory that it takes."""
    return os.fstat(file).st_blocks * 512 // MB


def mappings(file: int) -> int:
    """How often this memory is mapped; what an earlier test left behind does not count."""
    inode = str(os.fstat(file).st_ino)
    maps = Path("/proc/self/maps").read_text("utf-8").splitlines()
    return sum("veneer-adapter" in line and line.split()[4] == inode for line in maps)


def test_ranges_share_one_mapping_and_are_released_one_by_one(file: int) -> None:
    segment = MappedSegment(os.dup(file), SPACE)
    views = [segment.take(4 * MB * i, 3 * MB + 5000) for i in range(5)]
    for number, view in enumerate(views):
        view[0] = view[-1] = number + 1
    assert (mappings(file), used(file)) == (1, 20)
    del views[1], view
    assert (mappings(file), used(file)) == (1, 16)
    assert [(view[0], view[-1]) for view in views] == [(1, 1), (3, 3), (4, 4), (5, 5)]
    del segment, views[1:]
    assert (mappings(file), used(file)) == (1, 4), "a range keeps the mapping"
    views.clear()
    assert (mappings(file), used(file)) == (0, 0)


def test_a_range_that_begins_within_a_page_is_released_whole(file: int) -> None:
    """What lies before its place goes with it: a large page is given back whole or not."""
    segment = MappedSegment(os.dup(file), SPACE)
    views = [segment.take(4 * MB * i + 5 * mmap.PAGESIZE, 3 * MB) for i in range(5)]
    del views[2]
    assert used(file) == 16
    views.clear()
    assert (mappings(file), used(file)) == (1, 0)


def test_a_range_is_taken_once(file: int) -> None:
    segment = MappedSegment(os.dup(file), SPACE)
    view = segment.take(0, 3 * MB)
    for offset in (0, 2 * MB, 63 * MB):
        with pytest.raises(BufferError):
            segment.take(offset, 2 * MB)
    assert len(view) == 3 * MB


def test_a_closed_segment_gives_back_what_was_ready(file: int) -> None:
    segment = MappedSegment(os.dup(file), SPACE)
    view = segment.take(0, MB)
    view[0] = 7
    segment.close()
    assert (view[0], used(file)) == (7, 2)
    with pytest.raises(BufferError):
        segment.take(4 * MB, MB)
