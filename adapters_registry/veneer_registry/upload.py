"""One upload: announced files, written in order into the upload's own folder and hashed as
they arrive. If the connection breaks, the upload can be suspended and resumed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from veneer_registry.bundle_files import ALLOWED_FILES, REQUIRED_FILES, check_file_name
from veneer_registry.disk import FILE_MODE, disk_errors
from veneer_registry.entry import short_name
from veneer_registry.errors import Aborted, AdapterInvalid, ChecksumMismatch, InvalidField
from veneer_registry.records import UploadFile, UploadRequest
from veneer_registry.strict_json import show
from veneer_registry.weights import WEIGHTS_FILE

_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_LABEL_KEY: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}")
_MAX_LABELS: Final = 64
_MAX_LABEL: Final = 256
_CHUNK: Final = 1 << 20


def check_request(request: UploadRequest, max_adapter_bytes: int) -> None:
    """Refuse a request that can never become an adapter.

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
                f"{file.name} is listed twice; list it once",
                metadata={"file": file.name, "why": "announced twice"},
            )
        seen.add(file.name)
    for name in REQUIRED_FILES:
        if name not in seen:
            raise AdapterInvalid(
                f"{name} is missing; send {' and '.join(REQUIRED_FILES)} (`veneer adapter "
                "convert` makes them of an adapter from MLX or llama.cpp)",
                metadata={"file": name, "why": "missing"},
            )
    check_labels(request.labels)


def check_labels(labels: Mapping[str, str]) -> None:
    """Raise InvalidField unless a revision may have these labels."""
    if len(labels) > _MAX_LABELS:
        raise _bad_field("labels", f"at most {_MAX_LABELS} labels are allowed")
    for key, value in labels.items():
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
        fix = (
            "start the server with a larger --max-adapter-bytes"
            if file.name == WEIGHTS_FILE
            else "make it smaller"
        )
        raise AdapterInvalid(
            f"{file.name} is announced with {file.size} bytes; 1 to {most} are allowed: {fix}",
            metadata={"file": file.name, "why": "size", "limit": str(most)},
        )
    if not _SHA256.fullmatch(file.sha256):
        raise _bad_field("sha256", f"{file.name} needs its SHA-256 as 64 lower-case hex digits")


def _bad_field(name: str, message: str, **metadata: object) -> InvalidField:
    more = {key: str(value) for key, value in metadata.items()}
    return InvalidField(message, metadata={"field": name, **more})


@dataclass(slots=True)
class _Incoming:
    fd: int
    announced: UploadFile
    received: int = 0
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


class Upload:
    """Files of one announced adapter. Made by ``Registry.begin_upload``.

    One thread at a time. As a context manager it aborts on exit, which does nothing after a
    publish.
    """

    def __init__(
        self,
        request: UploadRequest,
        folder: Path,
        on_end: Callable[[Upload, bool], None],
        *,
        resumed: bool = False,
    ) -> None:
        """Args:
        folder: where the files go; with ``resumed``, its content counts as received.
        on_end: called once at the end, with whether to keep the folder.
        """
        self.request = request
        self.folder = folder
        self.resumed = resumed
        self._on_end = on_end
        self._lock = threading.Lock()
        self._open = True
        self._taken_over = False
        self._files: dict[str, _Incoming] = {}

    def open(self) -> None:
        """Open the files, and hash what they hold already.

        Raises:
            ChecksumMismatch: a complete file is not the announced one. The upload is
                aborted; begin a new one.
            DiskFull: the upload is aborted.
        """
        with self._lock:
            self._check_open()
            try:
                with disk_errors(self.folder.parent):
                    for file in self.request.files:
                        self._files[file.name] = _open(self.folder / file.name, file)
            except BaseException:
                self._end(keep=False)
                raise

    @property
    def received_bytes(self) -> int:
        """Bytes received so far, over all files."""
        return sum(file.received for file in self._files.values())

    @property
    def missing_bytes(self) -> int:
        """Announced bytes that have not been received."""
        return sum(file.announced.size - file.received for file in self._files.values())

    @property
    def committed(self) -> dict[str, int]:
        """Bytes received so far, by file."""
        return {name: file.received for name, file in self._files.items()}

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Append ``data`` to an announced file; ``offset`` must be its present end. In a
        resumed upload it may be smaller: bytes that are there are not written again.

        Raises:
            InvalidField: unknown file, wrong offset, more bytes than announced, or
                the upload has ended.
            Aborted: another connection has taken over this upload.
            DiskFull: the upload is aborted.
        """
        with self._lock:
            self._check_open()
            file = self._files.get(name)
            if file is None:
                raise _bad_field("file", f"file {show(name)} was not announced in the spec")
            if offset > file.received or (offset < file.received and not self.resumed):
                raise _bad_field(
                    "offset",
                    f"{name}: chunk at offset {offset}, expected {file.received}; "
                    "send chunks in order",
                    file=name,
                    expected=file.received,
                )
            if offset + len(data) > file.announced.size:
                raise _bad_field(
                    "data",
                    f"{name}: more than the {file.announced.size} bytes announced; "
                    "announce the size of the file that you send",
                    file=name,
                    announced=file.announced.size,
                )
            data = data[file.received - offset :]
            try:
                with disk_errors(self.folder.parent):
                    _write_all(file.fd, data)
            except BaseException:
                self._end(keep=False)
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
            self._check_open()
            for name, file in self._files.items():
                if file.received != file.announced.size:
                    raise _bad_field(
                        "files",
                        f"{name}: only {file.received} of {file.announced.size} bytes "
                        "arrived; send the whole file",
                        file=name,
                        received=file.received,
                    )
                _check_digest(file)
            self._close_files()

    def abort(self) -> None:
        """Drop everything that was received. Idempotent; does nothing after a publish."""
        with self._lock:
            self._end(keep=False)

    def suspend(self) -> None:
        """End the upload but keep the received bytes, so that it can be resumed. Idempotent."""
        with self._lock:
            self._end(keep=True)

    def take_over(self) -> bool:
        """`suspend` because another connection takes over the upload. False if it is being
        published already."""
        with self._lock:
            if self._open and self._files and all(f.fd < 0 for f in self._files.values()):
                return False
            self._taken_over = True
            self._end(keep=True)
            return True

    def _check_open(self) -> None:
        if self._taken_over:
            raise Aborted(
                "another connection has taken over this upload; wait until it ends, or start "
                "the upload again",
                metadata={"cause": "taken_over"},
            )
        if not self._open:
            raise _bad_field("upload", "the upload has ended; start a new one")

    def _end(self, *, keep: bool) -> None:
        self._close_files()
        if self._open:
            self._open = False
            self._on_end(self, keep)

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


def _open(path: Path, announced: UploadFile) -> _Incoming:
    """Open a file for appending; its present content is hashed and counts as received."""
    with contextlib.suppress(FileNotFoundError):
        there = path.stat(follow_symlinks=False)
        # A hard link is content of the store, which must never be written to.
        linked = there.st_nlink > 1
        if there.st_size > announced.size or (linked and there.st_size != announced.size):
            path.unlink()
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    file = _Incoming(os.open(path, flags, FILE_MODE), announced)
    try:
        while chunk := os.read(file.fd, _CHUNK):
            file.digest.update(chunk)
            file.received += len(chunk)
        if file.received == announced.size:
            _check_digest(file)
    except BaseException:
        os.close(file.fd)
        raise
    return file


def _check_digest(file: _Incoming) -> None:
    name, actual = file.announced.name, file.digest.hexdigest()
    if actual != file.announced.sha256:
        raise ChecksumMismatch(
            f"{name}: the received bytes have SHA-256 {actual[:12]}..., but "
            f"{file.announced.sha256[:12]}... was announced; send the file again",
            metadata={"file": name, "expected": file.announced.sha256, "actual": actual},
        )


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]
