"""Memory that a test and a process in QEMU share, at one address in both."""

from __future__ import annotations

import ctypes
import os
from ctypes import c_int32, c_uint8
from typing import Any, Final

import torch

BASE: Final = 0x2000_0000_0000
"""The address: Linux puts nothing there by itself."""
BYTES: Final = 4 << 30
"""Of addresses; only what is written takes memory."""
_LINE: Final = 64


class SharedMemory:
    """The shared memory, which grows. Packed weights and caches stay; what is put in a ``with
    memory:`` is dropped at its end."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("veneer-arm")
        os.ftruncate(self.fd, BYTES)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.mmap.restype = ctypes.c_void_p
        self._libc.mmap.argtypes = (
            [ctypes.c_void_p, ctypes.c_size_t] + 3 * [c_int32] + [ctypes.c_long]
        )
        # PROT_READ | PROT_WRITE; MAP_SHARED | MAP_FIXED_NOREPLACE
        at = self._libc.mmap(BASE, BYTES, 3, 0x100001, self.fd, 0)
        assert at == BASE, os.strerror(ctypes.get_errno())
        self._end = BASE

    def close(self) -> None:
        os.close(self.fd)
        self._libc.munmap(ctypes.c_void_p(BASE), ctypes.c_size_t(BYTES))

    def __enter__(self) -> SharedMemory:
        self._kept = self._end
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what was put in the block: it belonged to one call."""
        self._end = self._kept

    def reserve(self, size: int) -> int:
        """The address of so many bytes."""
        begin = -(-self._end // _LINE) * _LINE
        self._end = begin + size
        assert self._end <= BASE + BYTES
        return begin

    def take(self, size: int) -> torch.Tensor:
        """Zeros, as `_HugePages` of library.py has it."""
        memory = (c_uint8 * size).from_address(self.reserve(size))
        return torch.frombuffer(memory, dtype=torch.uint8).zero_()

    def put(self, address: int | None, size: int) -> int:
        """Copy ``size`` bytes from an address, unless they are in this memory; null stays."""
        if not address or BASE <= address < BASE + BYTES:
            return address or 0
        to = self.reserve(size)
        ctypes.memmove(to, address, size)
        return to

    def place(self, struct_or_array: Any) -> int:
        """Copy a struct, or an array of them."""
        return self.put(ctypes.addressof(struct_or_array), ctypes.sizeof(struct_or_array))
