"""Reads and writes packed files: a base's run of bytes, a record of its contents, and digests.

The run comes first, then a JSON record (`_Record`), then a footer with the record's length and
SHA-256. The record has the SHA-256 of each `CHUNK` of the run, so that all cores can verify
it: a core with SHA instructions does 1.8 GB/s, one without them 0.4.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Final

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from veneer_server.backends.native.packed.contents import LINE, Contents
from veneer_server.progress import Stage

CHUNK: Final = 8 << 20
_PIECE: Final = 1 << 20
"""Bytes that are read or written at once, and hashed while they are in a CPU cache."""
_SYNC: Final = 256 << 20
"""Bytes after which written data is synced to disk, so that little is left to do at the end."""
_FORMAT: Final = 1
_MAGIC: Final = b"VNRPACK1"
_FOOTER: Final = struct.Struct("<8sQ64s")
_LONGEST: Final = 64 << 20


class PackedFileDamaged(Exception):
    """A packed file cannot be used; the message tells an operator what is wrong with it."""


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    made_from: str
    chunk: int
    digests: tuple[str, ...]
    contents: Contents


class Writer:
    """Writes a packed file in a thread, while the caller makes the next part.

    Args:
        fd: descriptor of a new file. The caller closes it.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="packed")
        self._pending: list[Future[None]] = []
        self._size = 0
        self._unsynced = 0
        self._digests: list[str] = []
        self._hash = hashlib.sha256()

    def put(self, data: torch.Tensor) -> None:
        """Append bytes, which must not change until `end`.

        Raises:
            OSError: an earlier write failed.
        """
        for done in [each for each in self._pending if each.done()]:
            self._pending.remove(done)
            done.result()
        self._pending.append(self._thread.submit(self._write, data.numpy()))

    def end(self, made_from: str, contents: Contents) -> None:
        """Write the record, and wait until everything is on the disk.

        Raises:
            OSError: something cannot be written.
        """
        for each in self._pending:
            each.result()
        self._pending.clear()
        if self._size % CHUNK:
            self._digests.append(self._hash.hexdigest())
        assert self._size == contents.size
        record = msgspec.json.encode(
            _Record(_FORMAT, made_from, CHUNK, tuple(self._digests), contents)
        )
        checksum = hashlib.sha256(record).hexdigest()
        footer = _FOOTER.pack(_MAGIC, len(record), checksum.encode())
        _write_all(self._fd, memoryview(record + footer))
        os.fsync(self._fd)

    def close(self) -> None:
        """Stop writing."""
        self._thread.shutdown(cancel_futures=True)

    def _write(self, data: NDArray[np.uint8]) -> None:
        view = data.data.cast("B")
        while view:
            piece = view[: min(_PIECE, CHUNK - self._size % CHUNK)]
            self._hash.update(piece)
            _write_all(self._fd, piece)
            self._size += len(piece)
            self._unsynced += len(piece)
            if self._size % CHUNK == 0:
                self._digests.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()
            view = view[len(piece) :]
        if self._unsynced >= _SYNC:
            os.fdatasync(self._fd)
            self._unsynced = 0


class PackedReader:
    """An open packed file. Its record has been verified and belongs to the right base.

    Args:
        fd: descriptor of the file. The caller closes it.
        made_from: see `PackedStore.made_from`; must equal the record's.

    Raises:
        PackedFileDamaged: the message says what is wrong.
    """

    def __init__(self, fd: int, made_from: str) -> None:
        self._fd = fd
        self._record = _read_record(fd)
        if self._record.made_from != made_from:
            raise PackedFileDamaged("it was made from something else")

    @property
    def contents(self) -> Contents:
        return self._record.contents

    def read(self, to: torch.Tensor, threads: int, part: Stage) -> None:
        """Read and verify the run, on several threads.

        Args:
            to: memory for it, [`Contents.size`] uint8.

        Raises:
            PackedFileDamaged: it is not what was written, or cannot be read.
        """
        run = to.numpy().data
        self._each(threads, part, lambda begin, end: self._read(begin, run[begin:end]))

    def map(self, threads: int, part: Stage) -> torch.Tensor:
        """Verify the run and map it. Its pages are shared with other processes that map it.

        Raises:
            PackedFileDamaged: see `read`.
        """

        def check(begin: int, end: int) -> None:
            self._read(begin, memoryview(bytearray(end - begin)))

        self._each(threads, part, check)
        try:
            mapped = mmap.mmap(self._fd, self.contents.size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise MemoryError(f"the packed weights cannot be mapped: {error}") from error
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def _each(self, threads: int, part: Stage, work: Callable[[int, int], None]) -> None:
        size = self.contents.size
        part.update(0, size)
        with ThreadPoolExecutor(threads, thread_name_prefix="packed") as pool:
            pending = {
                pool.submit(work, begin, min(begin + CHUNK, size)): begin
                for begin in range(0, size, CHUNK)
            }
            try:
                for done in as_completed(pending):
                    done.result()
                    begin = pending[done]
                    part.advance(min(CHUNK, size - begin))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _read(self, begin: int, to: memoryview) -> None:
        hashed, done = hashlib.sha256(), 0
        try:
            while done < len(to):
                piece = to[done : done + _PIECE]
                count = os.preadv(self._fd, [piece], begin + done)
                if not count:
                    raise PackedFileDamaged("it is cut off")
                hashed.update(piece[:count])
                done += count
        except OSError as error:
            raise PackedFileDamaged(f"it cannot be read: {error.strerror or error}") from None
        if hashed.hexdigest() != self._record.digests[begin // CHUNK]:
            raise PackedFileDamaged("its content does not match its recorded digest")


def _read_record(fd: int) -> _Record:
    try:
        size = os.fstat(fd).st_size
        end = os.pread(fd, _FOOTER.size, size - _FOOTER.size)
        magic, length, checksum = _FOOTER.unpack(end)
        if magic != _MAGIC or length > min(_LONGEST, size - _FOOTER.size):
            raise PackedFileDamaged("its end is missing")
        encoded = os.pread(fd, length, size - _FOOTER.size - length)
        if hashlib.sha256(encoded).hexdigest().encode() != checksum:
            raise PackedFileDamaged("its header does not match its recorded digest")
        record = msgspec.json.decode(encoded, type=_Record)
    except (OSError, struct.error, msgspec.MsgspecError, OverflowError) as error:
        raise PackedFileDamaged(f"its header cannot be read: {error}") from None
    if record.format != _FORMAT or record.chunk != CHUNK:
        raise PackedFileDamaged(f"it has format {record.format} in chunks of {record.chunk}")
    run = record.contents.size
    if size != run + length + _FOOTER.size or len(record.digests) != -(-run // CHUNK):
        raise PackedFileDamaged("its size does not match the recorded one")
    return record


def _write_all(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


assert CHUNK % LINE == 0
