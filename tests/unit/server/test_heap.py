"""What a memory limit bounds, once the heap's free blocks are filled."""

from __future__ import annotations

import platform
import subprocess

import pytest
from veneer_registry.child_python import child_python

GLIBC = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries differ")

TAKES = """
import resource, sys
from veneer_server.system.heap import data_bytes, fill_holes
blocks = [bytes(600) for _ in range(60_000)]
del blocks[::2]  # 18 MB in holes that nothing can give back
if sys.argv[1] == "filled":
    fill_holes()
most = data_bytes() + (4 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (most, most))
taken = [None] * 100_000
count = 0
try:
    while True:
        taken[count] = bytes(600)
        count += 1
except MemoryError:
    taken.clear()
print(count * 600)
"""


@pytest.mark.parametrize(("holes", "more"), [("left", True), ("filled", False)])
def test_a_limit_bounds_all_that_is_used(holes: str, more: bool) -> None:
    command = child_python("-c", TAKES, holes)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert (int(said) > 8 << 20) is more


ARENAS = """
import ctypes, os, sys, threading
from veneer_server.system.heap import configure_malloc
if sys.argv[1] == "configured":
    configure_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info.argtypes = [ctypes.c_int, ctypes.c_void_p]
barrier = threading.Barrier(8)  # all of them run at the same time

def allocate():
    barrier.wait()
    for _ in range(1000):
        libc.malloc(100)
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
stream = libc.fdopen(1, b"w")
libc.malloc_info(0, stream)
libc.fflush(ctypes.c_void_p(stream))
"""


@GLIBC
@pytest.mark.parametrize(("how", "most"), [("configured", 2), ("not", 9)])
def test_threads_share_two_arenas(how: str, most: int) -> None:
    """Each had its own, and kept in it what it had freed."""
    command = child_python("-c", ARENAS, how)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = said.count("<heap nr=")
    assert found <= most
    assert how == "configured" or found > 2


ALLOCATED = """
import ctypes, sys
from veneer_server.system import heap
if sys.argv[1] == "mallinfo":  # as with glibc before 2.33
    heap._mallinfo = heap.mallinfo("mallinfo", ctypes.c_uint)
def growth(before):
    return (heap.allocated_bytes() - before) / 1e6
blocks = [None] * 30_000
start = heap.allocated_bytes()
for at in range(30_000):
    blocks[at] = bytes(1000)
print(growth(start))
blocks[::2] = [None] * 15_000
print(growth(start))
blocks[::2] = [bytes(1000) for _ in range(15_000)]  # where there were holes
print(growth(start))
blocks.append(bytes(20_000_000))
print(growth(start))
blocks.clear()
print(growth(start))
"""


@GLIBC
@pytest.mark.parametrize("function", ["mallinfo2", "mallinfo"])
def test_blocks_are_counted_whether_or_not_their_memory_is_new(function: str) -> None:
    """Within 1.5 MB: a block of 1,000 bytes takes 1,048, and glibc keeps some freed ones."""
    command = child_python("-c", ALLOCATED, function)
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    expected = [31.4, 15.7, 31.4, 51.4, 0.0]
    assert [float(line) for line in said.split()] == pytest.approx(expected, abs=1.5)
