"""Cached folders whose content is verified by a manifest, which is written last.

``veneer_manifest.json`` lists each file with its size and SHA-256, and says what the folder was
made from. A folder without a manifest, with missing or extra files, or with other content is
not used but rebuilt. Files up to `SMALL` bytes are hashed immediately; larger ones, the
weights, by a thread while they are loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.disk import sync

MANIFEST: Final = "veneer_manifest.json"
SMALL: Final = 16 << 20
_LONGEST: Final = 1 << 20
_FORMAT: Final = 1


class FolderDamaged(Exception):
    """A folder does not match its manifest. The message tells an operator what is wrong."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    size: int
    sha256: str
    mtime_ns: int


class _Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: int
    made_from: str
    files: dict[str, _File]


def seal(folder: Path, made_from: str) -> None:
    """Write the manifest of all files in the folder, and sync everything to disk.

    Args:
        made_from: what the folder is made from, to distinguish it from another folder that
            could have the same name.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.name] = _File(status.st_size, digest, status.st_mtime_ns)
    # Outside the folder: inside it, another process would take the draft for an unknown file.
    draft = folder.with_name(f"{folder.name}.manifest-{os.getpid()}")
    manifest = _Manifest(_FORMAT, made_from, files)
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    sync(draft)
    draft.replace(folder / MANIFEST)
    sync(folder)


class Sealed:
    """A folder whose names, sizes and small files match its manifest.

    Large files are hashed by a thread; see `verify`. They are kept open, so that the files
    hashed are those that have the names now.

    Args:
        ahead: start to hash large files now, rather than in `verify`.

    Raises:
        FolderDamaged: the message says what differs.
    """

    def __init__(self, folder: Path, made_from: str, *, ahead: bool = True) -> None:
        self._folder = folder
        self._open: dict[str, int] = {}
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="verify")
        try:
            self._manifest = _read(folder, made_from)
            for name, file in self._manifest.files.items():
                self._open[name] = _opened(folder / name, file)
                if file.size <= SMALL:
                    _compare(name, self._open[name], file)
            self._pending = self._hash() if ahead else None
        except BaseException:
            self.close()
            raise

    @property
    def unmoved(self) -> bool:
        """Whether no file was written since the folder was sealed, judging by the files'
        times."""
        return all(
            os.fstat(self._open[name]).st_mtime_ns == file.mtime_ns
            for name, file in self._manifest.files.items()
        )

    def verify(self) -> None:
        """Wait until all files are hashed and match. Only then may loaded data be used.

        Raises:
            FolderDamaged: a file does not match the manifest, or was replaced.
        """
        for each in self._hash() if self._pending is None else self._pending:
            each.result()
        for name, fd in self._open.items():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(fd), (self._folder / name).stat()):
                    continue
            raise FolderDamaged(f"{name} was replaced in the meantime")

    def _hash(self) -> list[Future[None]]:
        return [
            self._hashing.submit(_compare, name, self._open[name], file)
            for name, file in self._manifest.files.items()
            if file.size > SMALL
        ]

    def close(self) -> None:
        """Stop hashing, and close the files."""
        self._hashing.shutdown(cancel_futures=True)
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Sealed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(folder: Path, made_from: str) -> _Manifest:
    try:
        with _regular(folder / MANIFEST) as fd, open(fd, "rb", closefd=False) as file:
            manifest = msgspec.json.decode(file.read(_LONGEST), type=_Manifest)
        names = {entry.name for entry in os.scandir(folder)} - {MANIFEST}
    except FileNotFoundError:
        raise FolderDamaged(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, msgspec.MsgspecError) as error:
        raise FolderDamaged(f"{MANIFEST} cannot be read: {error}") from None
    if manifest.format != _FORMAT:
        raise FolderDamaged(f"{MANIFEST} has format {manifest.format}")
    if manifest.made_from != made_from:
        raise FolderDamaged("it was made from something else")
    if missing := sorted(manifest.files.keys() - names):
        raise FolderDamaged(f"it lacks {missing[0]}")
    if strange := sorted(names - manifest.files.keys()):
        raise FolderDamaged(f"it contains {strange[0]}, which does not belong to it")
    return manifest


@contextlib.contextmanager
def _regular(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError("it is not a regular file")
        yield fd
    finally:
        os.close(fd)


def _opened(path: Path, sealed: _File) -> int:
    try:
        with _regular(path) as fd:
            size = os.fstat(fd).st_size
            if size != sealed.size:
                raise FolderDamaged(f"{path.name} has {size} bytes instead of {sealed.size}")
            return os.dup(fd)
    except OSError as error:
        raise FolderDamaged(f"{path.name}: {error.strerror or error}") from None


def _compare(name: str, fd: int, sealed: _File) -> None:
    try:
        os.lseek(fd, 0, os.SEEK_SET)
        with open(fd, "rb", closefd=False) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FolderDamaged(f"{name} cannot be read: {error.strerror or error}") from None
    if digest != sealed.sha256:
        raise FolderDamaged(f"{name} does not match its recorded digest")
