"""The memory of an adapter: complete in both processes, in huge pages, released."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from veneer_server.adapters.pages import make_ready, map_pages, memory

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
