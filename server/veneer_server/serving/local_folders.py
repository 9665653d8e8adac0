"""Reads adapters from folders of this machine, as an upload without a client.

The caller names the path, so only paths below a root that the operator configured are opened.
Links are resolved first; the resolved path is then opened component by component without
following links. So a link that somebody creates in between is refused, not followed.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import stat
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.bundle_files import ALLOWED_FILES
from veneer_registry.errors import AdapterInvalid, InvalidField, Unavailable, Unimplemented
from veneer_registry.records import UploadFile

from veneer_server.serving.spare_time import to_the_end
from veneer_server.serving.uploads import (
    UploadChunk,
    UploadMessage,
    UploadOptions,
    check_file_count,
)

_PIECE: Final = 1 << 20
_PASSING: Final = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.EAGAIN,
        errno.EINTR,
        errno.EBUSY,
        errno.EHOSTDOWN,
        errno.ENOTCONN,
        errno.ENODEV,
        errno.ENXIO,
        errno.ECONNREFUSED,
        errno.ENOBUFS,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        getattr(errno, "EREMOTEIO", errno.EIO),  # Linux has it
    }
)
"""Errors caused by this machine, its disk or a network disk; all others are about the path."""
_MOST_PATH: Final = 4096
_NO_LINK: Final = "put the file itself there"
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class LocalFile:
    """An open file of an adapter."""

    name: str
    size: int
    descriptor: int


@dataclass(frozen=True, slots=True)
class LocalFolders:
    """The folders below which adapters may be loaded.

    Attributes:
        roots: absolute paths; empty if loading from folders is off.
        most_bytes: largest allowed file, for files without a limit of their own.
    """

    roots: tuple[Path, ...] = ()
    most_bytes: int = 2 << 30
    field: str = "lora_path"
    """The request's field that holds the path, for errors."""
    flag: str = "--lora-root"
    """The command-line flag that sets the roots, for errors."""
    _reader: ThreadPoolExecutor = dataclasses.field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="local-folder")
    )
    """One thread, so that a slow disk delays only other loads from folders."""

    @asynccontextmanager
    async def opened(self, given: str) -> AsyncIterator[tuple[LocalFile, ...]]:
        """As `open`, but reads the disk in the reader thread."""
        with ExitStack() as stack:
            opening = self.open(given)
            yield await to_the_end(lambda: stack.enter_context(opening), self._reader)

    async def messages(
        self, files: Sequence[LocalFile], options: UploadOptions
    ) -> AsyncGenerator[UploadMessage, None]:
        """Yield the messages of an upload of open files, as a client would send them. If a file
        changes meanwhile, it no longer matches its announced SHA-256, and the upload is
        refused.

        Args:
            options: the upload's options; the request's files are filled in.

        Raises:
            InvalidField: there are no files.
            AdapterInvalid, Unavailable: a file cannot be read.
        """
        check_file_count(len(files))
        announced = []
        for file in files:
            found = hashlib.sha256()
            for at in range(0, file.size, _PIECE):
                await self._piece(file, at, found.update)
            announced.append(UploadFile(file.name, file.size, found.hexdigest()))
        request = dataclasses.replace(options.request, files=tuple(announced))
        yield dataclasses.replace(options, request=request)
        for file in files:
            for at in range(0, file.size, _PIECE):
                yield UploadChunk(file.name, at, await self._piece(file, at))

    async def _piece(
        self, file: LocalFile, at: int, look: Callable[[bytes], None] = lambda data: None
    ) -> bytes:
        """Read a piece of a file; ``look`` is called with it in the reader thread."""

        def read() -> bytes:
            try:
                data = os.pread(file.descriptor, min(_PIECE, file.size - at), at)
            except OSError as error:
                raise _unreadable(file.name, error) from None
            look(data)
            return data

        # Wait even if cancelled: the caller may then close the descriptor, and its number may
        # be reused.
        return await to_the_end(read, self._reader)

    @contextmanager
    def open(self, given: str) -> Iterator[tuple[LocalFile, ...]]:
        """Open the adapter files in a folder; they stay open while the block runs. Blocks on
        the disk.

        Raises:
            Unimplemented: no roots are configured.
            InvalidField: there is no such folder below a root.
            AdapterInvalid: one of its files is too large, is not a regular file, or is a link
                that leads out of the roots.
            Unavailable: the server is out of file descriptors or memory, or the disk does not
                answer.
        """
        folder = Path(self._checked(given))
        with ExitStack() as opened:
            try:
                real = Path(os.path.realpath(folder, strict=True))
                descriptor = self._open_below(str(real), _FOLDER)
                if descriptor is not None:
                    opened.callback(os.close, descriptor)
                    names = sorted(ALLOWED_FILES.keys() & set(os.listdir(descriptor)))
            except (OSError, ValueError) as error:
                _check_passing(error)
                raise self._refused(
                    f"{given[:200]!r} is not a folder that the server can read "
                    f"({_words(error)})"
                ) from None
            if descriptor is None:
                raise self._outside(given)
            yield tuple(self._file(real, descriptor, name, opened) for name in names)

    def _checked(self, given: str) -> str:
        """Check a path without touching the disk, and return it."""
        if not self.roots:
            raise Unimplemented(
                "this server loads no adapters from folders: push it with `veneer adapter "
                "push`, or start the server with --lora-root and a folder that it may read",
                metadata={"flag": "--lora-root"},
            )
        path = Path(given)
        if len(given) > _MOST_PATH or "\0" in given or ".." in path.parts:
            raise self._refused(
                "it is too long, or has a component '..' or a NUL: give a plain path"
            )
        if not any(root in path.parents for root in self.roots):
            raise self._outside(given)
        return given

    def _outside(self, given: str) -> InvalidField:
        return self._refused(
            f"{given[:200]!r} is not below a folder that the server may read: give the "
            f"absolute path of a folder below one of its {self.flag}"
        )

    def _refused(self, why: str) -> InvalidField:
        return InvalidField(f"{self.field}: {why}", metadata={"field": self.field})

    def _file(self, folder: Path, descriptor: int, name: str, opened: ExitStack) -> LocalFile:
        try:
            status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
            if stat.S_ISLNK(status.st_mode):
                target = os.path.realpath(folder / name, strict=True)
                status = os.stat(target, follow_symlinks=False)
                _check_kind(name, status.st_mode)
                file = self._open_below(target, _FILE)
            else:
                _check_kind(name, status.st_mode)  # opening a device can have side effects
                file = os.open(name, _FILE, dir_fd=descriptor)
        except (OSError, ValueError) as error:
            raise _unreadable(name, error) from None
        if file is None:
            raise _invalid(
                name, f"is a link that leads out of the folders of {self.flag}", "outside"
            )
        opened.callback(os.close, file)
        try:
            status = os.fstat(file)
        except OSError as error:
            raise _unreadable(name, error) from None
        _check_kind(name, status.st_mode)
        most = ALLOWED_FILES[name] or self.most_bytes
        if status.st_size > most:
            fix = (
                "start the server with a larger --max-adapter-bytes"
                if ALLOWED_FILES[name] is None
                else "make it smaller"
            )
            raise _invalid(
                name,
                f"has {status.st_size} bytes, more than the {most} allowed",
                "size",
                fix,
            )
        return LocalFile(name, status.st_size, file)

    def _open_below(self, real: str, flags: int) -> int | None:
        """Open a path that contains no links; None if it is not below a root. Raises
        OSError."""
        for root in self.roots:
            base = os.path.realpath(root)
            if os.path.commonpath([base, real]) != base or base == real:
                continue
            *parts, last = Path(real).relative_to(base).parts
            descriptor = os.open(base, _FOLDER)
            try:
                for part in parts:
                    inner = os.open(part, _FOLDER, dir_fd=descriptor)
                    os.close(descriptor)
                    descriptor = inner
                return os.open(last, flags, dir_fd=descriptor)
            finally:
                os.close(descriptor)
        return None


def _words(error: OSError | ValueError) -> str:
    """The reason of an error, without the path."""
    return (error.strerror or "an error") if isinstance(error, OSError) else "no valid path"


def _check_passing(error: OSError | ValueError) -> None:
    """Raise Unavailable for an error caused by this machine or its disks, not by the path."""
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise Unavailable(
            f"the server cannot read the folder now ({_words(error)}): try again; if this "
            "persists, ask the operator to check the disk and the process limits",
            retry_after_s=1.0,
            metadata={"cause": "disk"},
            detail=str(error),
        ) from None


def _unreadable(name: str, error: OSError | ValueError) -> AdapterInvalid:
    """Return the error for a file that cannot be read. Raises Unavailable if a retry may
    succeed."""
    _check_passing(error)
    denied = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM)
    return _invalid(
        name,
        f"cannot be read by the server ({_words(error)})",
        "unreadable",
        "let the server's user read it" if denied else _NO_LINK,
    )


def _check_kind(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise _invalid(name, "is not a regular file", "kind")


def _invalid(name: str, why: str, cause: str, fix: str = _NO_LINK) -> AdapterInvalid:
    return AdapterInvalid(f"{name} {why}: {fix}", metadata={"file": name, "cause": cause})
