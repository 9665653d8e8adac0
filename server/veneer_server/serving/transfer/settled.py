"""Whether a folder that appears in a watched one is whole, and by what its content is known.

A folder counts as whole when its config parses, its weights are as long as their header says,
nobody has one of its files open for writing, and nothing has changed between two looks. Who
copies a folder to a hidden name and renames it never depends on any of this.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_registry.bundle_files import ALLOWED_FILES, REQUIRED_FILES
from veneer_registry.errors import AdapterInvalid
from veneer_registry.lora_config import CONFIG_FILE, CONFIG_LIMIT
from veneer_registry.safetensors_header import read_header
from veneer_registry.weights import WEIGHTS_FILE

from veneer_server.serving.local_folders import LocalFile

__all__ = ["Seen", "is_whole", "look", "look_at"]

_MOST: Final = 100_000
"""Folders that are looked at."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A folder at one look.

    Attributes:
        signature: of each file of a bundle its name, inode, size and times; empty if one
            that every adapter has is missing.
    """

    signature: tuple[tuple[str | int, ...], ...]


def look(root: Path) -> Mapping[str, Seen]:
    """The folders below ``root``, by name; hidden ones are left out. Raises OSError."""
    found: dict[str, Seen] = {}
    with os.scandir(root) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and len(found) < _MOST and _is_folder(entry):
                found[entry.name] = look_at(root / entry.name)
    return found


def look_at(folder: Path) -> Seen:
    """One folder."""
    files: list[tuple[str | int, ...]] = []
    try:
        real = os.path.realpath(folder)
        for name in ALLOWED_FILES:
            try:
                status = os.stat(os.path.join(real, name))
            except FileNotFoundError:
                if name in REQUIRED_FILES:
                    return Seen(())
                continue
            times = status.st_mtime_ns, status.st_ctime_ns
            kind = stat.S_IFMT(status.st_mode)
            files.append((name, status.st_dev, status.st_ino, kind, status.st_size, *times))
    except OSError as error:
        return Seen(((error.strerror or "",),))  # trying to publish it says why
    return Seen(((real,), *files))


def is_whole(files: Sequence[LocalFile]) -> bool:
    """Whether open files look complete, and nobody writes to one of them."""
    by_name = {file.name: file for file in files}
    if not {*REQUIRED_FILES} <= by_name.keys():
        return False
    if any(_is_written(file.descriptor) for file in files):
        return False
    try:
        text = os.pread(by_name[CONFIG_FILE].descriptor, CONFIG_LIMIT, 0)
        if not isinstance(json.loads(text), dict):
            return False
        with os.fdopen(os.dup(by_name[WEIGHTS_FILE].descriptor), "rb") as file:
            read_header(file, WEIGHTS_FILE)
    except (OSError, ValueError, RecursionError, AdapterInvalid):
        return False
    return True


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _is_written(descriptor: int) -> bool:
    """Whether a process of this machine has the file open for writing, as far as can be
    known: the kernel grants a lease for reading only if none has."""
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # One that opens it now would send SIGIO, which ends a process; SIGURG does not.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:  # another user's file, or a file system without leases
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False
