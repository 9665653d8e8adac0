"""Writes files and folders that appear complete or not at all.

Both are created beside their final place, since only a rename within one file system is atomic.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veneer_registry.disk import sync


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """Yield an empty file to write, which replaces ``path`` at the end of the block.

    It is then durable (fsync of the file, and of its folder after the rename). If the block
    raises, ``path`` stays as it was. Two processes may write the same path at once: the last
    one to finish wins. Two threads of one process may not. A killed process leaves a hidden
    file with its process id: ``.NAME.PID.new``.

    Args:
        path: its folder must exist.
        mode: the file's mode, whatever the umask; None leaves it to the umask.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        fd = os.open(draft, flags, 0o666 if mode is None else mode)
        try:
            if mode is not None:
                os.fchmod(fd, mode)
        finally:
            os.close(fd)
        yield draft
        sync(draft)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    sync(path.parent)


def replace_file(path: Path, data: str | bytes, *, mode: int | None = None) -> None:
    """Write a whole file by `replacing`; text as UTF-8."""
    with replacing(path, mode=mode) as draft:
        draft.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a path at which to create a folder, which becomes ``out`` at the end of the block.

    Others may read the folder and its files, whatever the umask. ``out`` must not exist; its
    parents are created. If the block raises, ``out`` is not created.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        staging = Path(scratch) / out.name
        yield staging
        for path in (staging, *staging.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.rename(out)
