"""Pulls an adapter: receives a revision's files into a hidden folder beside the target,
verifies them, and renames the folder to the target.

`Download` makes the decisions; the clients only feed it the server's messages.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from veneer_proto.v1 import adapters_pb2
from veneer_registry.bundle import Bundle
from veneer_registry.bundle_files import ALLOWED_FILES, REQUIRED_FILES
from veneer_registry.disk import sync
from veneer_registry.errors import (
    Aborted,
    ChecksumMismatch,
    InternalError,
    InvalidField,
)
from veneer_registry.format import read_adapter

from veneer_client import convert_admin
from veneer_client.records import Pulled

__all__ = ["Download"]

Progress = Callable[[int, int], None]
"""Called with (bytes that have arrived, total bytes)."""


@dataclass(slots=True)
class _Arriving:
    """A file that is being received."""

    size: int
    sha256: str
    file: io.BufferedWriter
    digest: hashlib._Hash
    received: int = 0


class Download:
    """Receives one revision, over as many connections as needed: each attempt starts over,
    with the revision of the first. A context manager that removes an unfinished download."""

    def __init__(self, name: str, folder: Path, *, force: bool, progress: Progress) -> None:
        """Args:
        folder: created by `finish`; must not exist or must be empty.
        force: also accept a folder that holds an adapter, and replace it.

        Raises:
            InvalidField: the folder already holds something that may not be replaced.
        """
        self._name = name
        self._folder = Path(os.path.abspath(folder))
        self._force = force
        self._progress = progress
        self._staging: Path | None = None
        self._files: dict[str, _Arriving] = {}
        self._info: adapters_pb2.Adapter | None = None
        self._done = 0
        self._check_target()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clear()

    def begin(self) -> adapters_pb2.DownloadAdapterRequest:
        """Start an attempt and return its request; drops the data of an earlier attempt."""
        if self._info is not None:
            # An alias or a name may have moved since.
            self._name = f"{self._info.name}@{self._info.revision}"
        self._clear()
        return adapters_pb2.DownloadAdapterRequest(name=self._name)

    def receive(self, message: adapters_pb2.DownloadAdapterResponse) -> None:
        """Take the server's next message, and write its data to disk.

        Raises:
            InternalError: the server did not send a valid download.
        """
        if message.WhichOneof("message") == "start" and not self._files:
            self._start(message.start)
        elif message.WhichOneof("message") == "chunk":
            self._write(message.chunk)
        else:
            raise _not_a_download("an unexpected message")

    def finish(self) -> Pulled:
        """Verify the received files and move them to the target.

        Raises:
            Aborted: something is missing.
            ChecksumMismatch: the files differ from the uploaded ones; the target is unchanged.
            InvalidField: the target has meanwhile got content that may not be replaced.
        """
        staging, info = self._staging, self._info
        if staging is None or info is None:
            raise Aborted(
                "the server sent nothing: pull again", metadata={"cause": "cut_short"}
            )
        for name, file in self._files.items():
            if file.received != file.size:
                raise Aborted(
                    f"{name}: {file.received} of {file.size} bytes arrived: pull again",
                    metadata={"file": name, "cause": "cut_short"},
                )
            file.file.close()
            if file.digest.hexdigest() != file.sha256:
                raise _other_content(name, file.sha256, file.digest.hexdigest())
        extra = {n: f.sha256 for n, f in self._files.items() if n not in REQUIRED_FILES}
        # Computed from the received bytes, without trusting what the server says.
        found = Bundle(read_adapter(staging, None).weights_digest, extra).revision
        if found != info.revision:
            raise _other_content("the adapter", info.revision, found)
        self._place(staging)
        return Pulled(
            adapter=convert_admin.adapter_info(info),
            files={name: file.size for name, file in self._files.items()},
        )

    # ------------------------------------------------------------------------ parts

    def _start(self, start: adapters_pb2.DownloadStart) -> None:
        names = [file.name for file in start.files]
        strange = [name for name in names if name not in ALLOWED_FILES]
        if strange or len(set(names)) < len(names) or not {*REQUIRED_FILES} <= {*names}:
            raise _not_a_download(f"files {', '.join(names)[:200]}")
        if not start.adapter.revision.startswith(self._name.partition("@")[2]):
            raise _not_a_download("a different revision from the one requested")
        self._info = start.adapter
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._staging = Path(
            tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent)
        )
        for file in start.files:
            opened = (self._staging / file.name).open("xb")
            self._files[file.name] = _Arriving(file.size, file.sha256, opened, hashlib.sha256())
        self._progress(0, self._total)

    @property
    def _total(self) -> int:
        return sum(file.size for file in self._files.values())

    def _write(self, chunk: adapters_pb2.UploadChunk) -> None:
        file = self._files.get(chunk.file)
        if file is None or chunk.offset != file.received:
            raise _not_a_download("an unexpected chunk")
        if file.received + len(chunk.data) > file.size:
            raise _not_a_download("more bytes than it announced")
        file.file.write(chunk.data)
        file.digest.update(chunk.data)
        file.received += len(chunk.data)
        self._done += len(chunk.data)
        self._progress(self._done, self._total)

    def _check_target(self) -> None:
        try:
            mode = self._folder.lstat().st_mode
        except FileNotFoundError:
            return
        if stat.S_ISDIR(mode):
            names = os.listdir(self._folder)
            if not names:
                return
            if self._force:
                others = sorted(set(names) - ALLOWED_FILES.keys())
                if not others:
                    return
                raise InvalidField(
                    f"{self._folder} holds other files ({', '.join(others)[:200]}), which "
                    "--force would remove: pull into another folder",
                    metadata={"field": "folder", "cause": "others"},
                )
        raise InvalidField(
            f"{self._folder} exists: pull into another folder, or replace the adapter in it "
            "with --force",
            metadata={"field": "folder", "cause": "exists"},
        )

    def _place(self, staging: Path) -> None:
        for path in staging.iterdir():
            path.chmod(0o644)
            sync(path)
        staging.chmod(0o755)
        sync(staging)
        self._check_target()
        old: Path | None = None
        if self._folder.exists() and any(self._folder.iterdir()):
            old = Path(
                tempfile.mkdtemp(prefix=f".{self._folder.name}.", dir=self._folder.parent)
            )
            self._folder.rename(old)  # onto an empty folder, which a rename replaces
        try:
            staging.rename(self._folder)
        except BaseException:
            if old is not None:
                old.rename(self._folder)
            raise
        self._staging = None
        sync(self._folder.parent)
        if old is not None:
            shutil.rmtree(old)

    def _clear(self) -> None:
        for file in self._files.values():
            file.file.close()
        self._files.clear()
        self._done = 0
        if self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None


def _not_a_download(what: str) -> InternalError:
    return InternalError(
        f"the server sent {what} instead of a valid download: report this with the server's "
        "version",
        metadata={"cause": "download"},
    )


def _other_content(what: str, expected: str, actual: str) -> ChecksumMismatch:
    return ChecksumMismatch(
        f"{what} arrived with SHA-256 {actual[:12]}..., and {expected[:12]}... was uploaded: "
        "pull again; if this persists, the server's copy is damaged: push the adapter again",
        metadata={"file": what, "expected": expected, "actual": actual},
    )
