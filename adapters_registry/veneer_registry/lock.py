"""One owner per data folder: an advisory lock that ends with its process.

Standard library only, so that a server can take the lock before its heavy imports.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from veneer_registry.errors import InvalidField, StoreLocked

_FILE: Final = "LOCK"


class OwnerLock:
    """Holds ``<data>/LOCK`` until `release` or the end of the process.

    The file stays: only the kernel's lock on it counts, so a crash leaves nothing
    to clean up. Its text (pid, start) is for the message to the second owner.
    """

    def __init__(self, data_dir: Path) -> None:
        """Take the lock, creating the folder if needed.

        Raises:
            StoreLocked: another process (metadata ``pid``) owns the folder.
            InvalidField: the folder cannot be created or written.
        """
        self.data_dir = data_dir
        try:
            _make(data_dir)
            self._fd = os.open(data_dir / _FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidField(
                f"data folder {data_dir} cannot be used ({error.strerror}); give another "
                "with --data-dir",
                metadata={"field": "data_dir"},
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.read(self._fd, 200)
            os.close(self._fd)
            pid = _pid(owner)
            raise StoreLocked(
                f"data folder {data_dir} is in use by a running server (process {pid}); stop "
                "it, or give another folder with --data-dir",
                metadata={"pid": pid, "data_dir": str(data_dir)},
            ) from error
        self._held = True
        text = json.dumps({"pid": os.getpid(), "started": time.time()}).encode()
        with contextlib.suppress(OSError):  # a full disk: we hold the lock anyway
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, text, 0)

    def release(self) -> None:
        """Release the lock. Idempotent."""
        if self._held:
            self._held = False
            os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _make(folder: Path) -> None:
    """Create a folder and its missing parents durably, so that a power cut cannot lose the
    folder with everything stored in it."""
    made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(0o700, parents=True, exist_ok=True)
    for each in made:
        fd = os.open(each.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _pid(text: bytes) -> str:
    try:
        return str(int(json.loads(text)["pid"]))
    except (ValueError, KeyError, TypeError):
        return "unknown"
