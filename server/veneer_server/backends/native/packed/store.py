"""Keeps packed bases on disk between starts.

There is one file in ``<cache>/packed`` for each base, quantization, layout and version of the
libraries. As with compiled kernels (`native.kept`), it is only used if nobody else could have
written it, and it appears in one rename. A file that cannot be used only costs a log line and
the time to pack again; so does a folder that cannot be written.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

import torch
from veneer_registry.disk import sync

from veneer_server.backends.native import kept
from veneer_server.backends.native.packed.contents import Contents
from veneer_server.backends.native.packed.file import PackedFileDamaged, PackedReader, Writer
from veneer_server.progress import stage
from veneer_server.system.disk import remove

log = logging.getLogger(__name__)

_NAME: Final = re.compile(r"[0-9a-f]{32}-.+\.packed")
_SCRATCH: Final = "veneer-pack-"

_Base = TypeVar("_Base")


class PackedStore:
    """The file of one base.

    Args:
        source: the base's folder. The file must match its config as well as the fingerprint
            of its weights, since rotary frequencies follow from the config.
        layout: `Library.layout`.
    """

    def __init__(
        self, cache_dir: Path, source: Path, *, fingerprint: str, quantization: str, layout: int
    ) -> None:
        # Files written by another library version are not trusted to mean the same.
        libraries = f"bnb{version('bitsandbytes')}-tf{version('transformers')}"
        self._cache = cache_dir.absolute()
        self._place = self._cache / "packed"
        self._base = f"{fingerprint[:32]}-{quantization}"
        self.file = self._place / f"{self._base}-layout{layout}-{libraries}.packed"
        config = hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
        self._made_from = f"weights {fingerprint}, config {config}, {self.file.stem}"

    def load(self, use: Callable[[PackedReader], _Base]) -> _Base | None:
        """Return the result of ``use`` on the file, or None if there is no usable file.

        The file stays open and locked for as long as this process lives, so that a server of
        another version does not remove it.
        """
        if not os.path.lexists(self.file):
            return None
        try:
            kept.check_folder(self._place)
        except (kept.FileRefused, OSError) as reason:
            log.warning("not reading packed weights from %s: %s", self._place, reason)
            return None
        try:
            with contextlib.ExitStack() as failed:
                fd = kept.open_own(self.file)
                failed.callback(os.close, fd)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                base = use(PackedReader(fd, self._made_from))
                failed.pop_all()
                return base
        except (kept.FileRefused, PackedFileDamaged, OSError) as reason:
            log.warning(
                "the packed weights %s are not usable, packing again: %s",
                self.file,
                reason,
            )
        kept.discard(self.file)
        return None

    @contextlib.contextmanager
    def draft(self) -> Iterator[Draft]:
        """Context with a new file, which is removed at the end unless `Draft.keep` is used."""
        draft = Draft(self)
        with contextlib.ExitStack() as stack:
            try:
                folder = stack.enter_context(kept.scratch(self._place, _SCRATCH, _NAME))
                draft.begin(folder / "base.packed")
            except (OSError, kept.FileRefused) as reason:
                draft.fail(reason)
            stack.callback(draft.close)
            yield draft

    def keep(self, made: Path) -> None:
        """Give a finished file its name, and remove this base's files of other versions."""
        made.chmod(0o644)  # whatever the umask
        if self.file.is_dir():
            remove(self.file)
        made.replace(self.file)
        sync(self._place)
        for old in self._place.glob(f"{self._base}-*.packed"):
            if old != self.file and _unused(old):
                log.info("removing packed weights from another version: %s", old)
                kept.discard(old)
        # Servers before this layout kept bitsandbytes' form of the same weights.
        for folder in (self._cache / "quantized").glob(f"{self._base}-bfloat16-*"):
            log.info("removing 4-bit weights from an older version: %s", folder)
            kept.discard(folder)

    def made_from(self) -> str:
        """A description of the file's sources, which a usable file must match."""
        return self._made_from

    def tell(self, reason: Exception) -> None:
        """Log why the packed base is not kept."""
        log.warning(
            "the packed weights cannot be saved in %s; every start will pack them again: %s",
            self._place,
            reason,
        )


class Draft:
    """A file being written. If a write fails, one line is logged and later calls do nothing."""

    def __init__(self, store: PackedStore) -> None:
        self._store = store
        self._path = Path()
        self._fd = -1
        self._writer: Writer | None = None

    def begin(self, path: Path) -> None:
        """Create the file. Raises OSError."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._path, self._fd = path, os.open(path, flags, 0o600)
        self._writer = Writer(self._fd)

    def put(self, data: torch.Tensor) -> None:
        """Append bytes, which must not change until `keep` or `close`."""
        if self._writer is not None:
            try:
                self._writer.put(data)
            except OSError as reason:
                self.fail(reason)

    def keep(self, contents: Contents) -> None:
        """Finish the file and give it its name."""
        if self._writer is None:
            return
        try:
            with stage("writing the packed weights"):
                self._writer.end(self._store.made_from(), contents)
            self._store.keep(self._path)
        except (OSError, kept.FileRefused) as reason:
            self.fail(reason)

    def fail(self, reason: Exception) -> None:
        """Give up the file and remove it at once, so that a full disk gets its space back."""
        self.close()
        with contextlib.suppress(OSError):
            self._path.unlink()
        self._store.tell(reason)

    def close(self) -> None:
        """Stop writing. Idempotent."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unused(file: Path) -> bool:
    """Return True if no server has the file open, as far as its lock tells."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
