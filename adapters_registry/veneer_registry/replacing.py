"""Files and folders that appear whole, under their name, or not at all.

Both are made beside their place, since only a rename within one file system is atomic.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from veneer_registry.disk import sync

__all__ = ["new_folder", "replace_file", "replacing"]


@contextlib.contextmanager
def replacing(path: Path, *, mode: int | None = None) -> Iterator[Path]:
    """An empty file to write in place of ``path``, which it becomes at the end of the block.

    By then it is on the disk (fsync of the file, and of its folder after the rename). If the
    block raises, ``path`` stays as it was. Two processes may write the same path at once: the
    last one to finish wins. Two threads of a process may not. What a killed process leaves is
    hidden and named after it: ``.NAME.PID.new``.

    Args:
        path: its folder must exist.
        mode: of the file, whatever the umask; None leaves it to the umask.
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
    """Write a whole file as `replacing` does; text as UTF-8."""
    with replacing(path, mode=mode) as draft:
        draft.write_bytes(data.encode("utf-8") if isinstance(data, str) else data)


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A path at which to make a folder, which becomes ``out`` at the end of the block.

    Others may read the folder and its files, whatever the umask. Folders above ``out`` are
    made. ``out`` must not exist; if the block raises, it still does not.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        staging = Path(scratch) / out.name
        yield staging
        for path in (staging, *staging.iterdir()):
            path.chmod(0o755 if path.is_dir() else 0o644)
        staging.rename(out)
