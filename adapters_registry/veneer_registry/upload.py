"""One upload: announced files, written in order into a staging folder, hashed as they come."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from veneer_registry.adapter import check_name
from veneer_registry.errors import AdapterInvalid, ChecksumMismatch, InvalidField
from veneer_registry.format import ALLOWED_FILES, REQUIRED_FILES, WEIGHTS_FILE, check_file_name
from veneer_registry.records import UploadFile, UploadRequest
from veneer_registry.store import disk_errors
from veneer_registry.strict_json import show

__all__ = ["Upload", "check_request", "short_name"]

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LABEL_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_MAX_LABELS: Final = 64
_MAX_LABEL: Final = 256


def short_name(name: str) -> str:
    """`check_name` that never repeats more than 80 characters of a stranger's name."""
    return check_name(name if len(name) <= 80 else name[:80])


def check_request(request: UploadRequest, max_adapter_bytes: int) -> None:
    """Refuse an announcement that can never become an adapter.

    Raises:
        InvalidField: name, sizes, digests or labels are out of range.
        AdapterInvalid: a file is not allowed, too large, repeated or missing.
    """
    short_name(request.name)
    seen: set[str] = set()
    for file in request.files:
        _check_file(file, max_adapter_bytes)
        if file.name in seen:
            raise AdapterInvalid(
                f"{file.name} is announced twice; announce it once",
                metadata={"file": file.name, "why": "announced twice"},
            )
        seen.add(file.name)
    for name in REQUIRED_FILES:
        if name not in seen:
            raise AdapterInvalid(
                f"{name} is missing; send {' and '.join(REQUIRED_FILES)}",
                metadata={"file": name, "why": "missing"},
            )
    if len(request.labels) > _MAX_LABELS:
        raise _bad_field("labels", f"at most {_MAX_LABELS} labels are allowed")
    for key, value in request.labels.items():
        if not _LABEL_KEY.fullmatch(key):
            raise _bad_field("labels", f"label {show(key)} needs 1 to 63 letters, digits, ._/-")
        if len(value) > _MAX_LABEL or not value.isprintable():
            raise _bad_field(
                "labels",
                f"label {key} needs a printable value of at most {_MAX_LABEL} characters",
            )


def _check_file(file: UploadFile, max_adapter_bytes: int) -> None:
    check_file_name(file.name)
    limit = ALLOWED_FILES[file.name]
    most = max_adapter_bytes if limit is None else limit
    if not 1 <= file.size <= most:
        fix = "raise --max-adapter-bytes" if file.name == WEIGHTS_FILE else "make it smaller"
        raise AdapterInvalid(
            f"{file.name} is announced with {file.size} bytes; 1 to {most} are allowed: {fix}",
            metadata={"file": file.name, "why": "size", "limit": str(most)},
        )
    if not _SHA256.fullmatch(file.sha256):
        raise _bad_field("sha256", f"{file.name} needs its SHA-256 as 64 lower-case hex digits")


def _bad_field(name: str, message: str) -> InvalidField:
    return InvalidField(message, metadata={"field": name})


@dataclass(slots=True)
class _Incoming:
    fd: int
    announced: UploadFile
    received: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class Upload:
    """Files of one announced adapter. Made by ``Registry.begin_upload``.

    One thread at a time; as a context manager it aborts on leaving, which after a
    publish has nothing left to remove.
    """

    def __init__(
        self, request: UploadRequest, folder: Path, discard: Callable[[Upload], None]
    ) -> None:
        """Open the files of ``request`` in ``folder``; ``discard`` removes the folder."""
        self.request = request
        self.folder = folder
        self._discard = discard
        self._lock = threading.Lock()
        self._open = True
        self._files: dict[str, _Incoming] = {}
        try:
            with disk_errors(folder):
                for file in request.files:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                    fd = os.open(folder / file.name, flags, 0o644)
                    self._files[file.name] = _Incoming(fd, file)
        except BaseException:
            self.abort()
            raise

    @property
    def received_bytes(self) -> int:
        """Bytes written so far, over all files."""
        return sum(file.received for file in self._files.values())

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Append ``data`` to an announced file; ``offset`` must be where it ended.

        Raises:
            InvalidField: unknown file, wrong offset, more bytes than announced, or
                the upload has ended.
            DiskFull: the upload is aborted.
        """
        with self._lock:
            file = self._files.get(name)
            if not self._open:
                raise _bad_field("upload", "the upload has ended; begin a new one")
            if file is None:
                raise _bad_field("file", f"file {show(name)} was not announced in the spec")
            if offset != file.received:
                raise _bad_field(
                    "offset",
                    f"{name}: chunk at offset {offset}, expected {file.received}; "
                    "send chunks in order",
                )
            if offset + len(data) > file.announced.size:
                raise _bad_field(
                    "data",
                    f"{name}: more than the {file.announced.size} bytes announced; "
                    "announce the size of the file that you send",
                )
            try:
                with disk_errors(self.folder.parent):
                    _write_all(file.fd, data)
            except BaseException:
                self._end()
                raise
            file.digest.update(data)
            file.received += len(data)

    def finish(self) -> None:
        """Close the files and compare sizes and checksums with the announcement.

        Raises:
            InvalidField: a file is incomplete, or the upload has ended.
            ChecksumMismatch: metadata ``file``, ``expected``, ``actual``.
        """
        with self._lock:
            if not self._open:
                raise _bad_field("upload", "the upload has ended; begin a new one")
            for name, file in self._files.items():
                if file.received != file.announced.size:
                    raise _bad_field(
                        "files",
                        f"{name}: {file.received} of {file.announced.size} bytes arrived; "
                        "send all of them",
                    )
                actual = file.digest.hexdigest()
                if actual != file.announced.sha256:
                    raise ChecksumMismatch(
                        f"{name}: the bytes that arrived have SHA-256 {actual[:12]}..., "
                        f"announced was {file.announced.sha256[:12]}...; send the file again",
                        metadata={
                            "file": name,
                            "expected": file.announced.sha256,
                            "actual": actual,
                        },
                    )
            self._close_files()

    def abort(self) -> None:
        """Drop everything that was received. May be called again, also after a publish."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._close_files()
        if self._open:
            self._open = False
            self._discard(self)

    def _close_files(self) -> None:
        for file in self._files.values():
            if file.fd >= 0:
                os.close(file.fd)
                file.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.abort()


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
