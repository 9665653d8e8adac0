"""Controls where Linux puts this process's memory and threads: by system call, without libnuma.

Containers may refuse either call (seccomp); the server then runs without it.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection
from typing import Final

_SET_MEMPOLICY: Final = {"x86_64": 238, "aarch64": 237}
_INTERLEAVE: Final = 3
_BITS: Final = 8 * ctypes.sizeof(ctypes.c_ulong)


def spread_memory(nodes: Collection[int]) -> str:
    """Interleave over these NUMA nodes the pages that this thread, and threads that it starts,
    touch first. Returns the reason on failure; empty on success."""
    number = _SET_MEMPOLICY.get(platform.machine())
    if number is None:
        return f"no system call is known for {platform.machine()}"
    mask = (ctypes.c_ulong * (max(nodes) // _BITS + 1))()
    for node in nodes:
        mask[node // _BITS] |= 1 << node % _BITS
    libc = ctypes.CDLL(None, use_errno=True)
    # The kernel reads one bit less than it is told.
    bits = ctypes.c_ulong(len(mask) * _BITS + 1)
    if libc.syscall(ctypes.c_long(number), ctypes.c_long(_INTERLEAVE), mask, bits) == 0:
        return ""
    return f"set_mempolicy: {os.strerror(ctypes.get_errno())}"


def stay_on(cpus: Collection[int]) -> str:
    """Let this thread, and all that it starts, run on these CPUs only. Returns the reason on
    failure; empty on success."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        return f"sched_setaffinity: {error.strerror}"
    return ""
