"""Crash-safe checkpoints, from which only the same run can resume.

A checkpoint is a folder that Trainer writes, file by file. It is valid once it contains a
record: the SHA-256 of each file, written last, by one rename, after the files are durable.
A killed process leaves a folder without a record, which is removed. The record also
identifies the run: resuming with other data, another base or another config would give an
adapter that no manifest describes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from typing import Any, ClassVar, Final

from veneer_registry.disk import sync
from veneer_registry.errors import DiskFull, InvalidField, VeneerError
from veneer_registry.replacing import replace_file

RECORD: Final = "veneer_checkpoint.json"
_PREFIX: Final = "checkpoint-"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class CheckpointFailed(VeneerError):
    """A checkpoint could not be written (metadata ``what``)."""

    code = "INTERNAL"
    reason: ClassVar[str] = "CHECKPOINT_FAILED"


@dataclass(frozen=True, slots=True)
class TrainerCheckpoint:
    """A valid checkpoint.

    Attributes:
        step: optimiser steps done.
        facts: facts that the run saved with it.
    """

    folder: Path
    step: int
    facts: Mapping[str, Any]


class Checkpoints:
    """The checkpoints of one run, in their own folder.

    Args:
        identity: plain facts that must be equal for a run to resume from a checkpoint.
        keep: how many of the newest to keep.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        self.root = root
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep

    def newest(self) -> TrainerCheckpoint | None:
        """The newest valid checkpoint; incomplete ones are removed.

        Raises:
            InvalidField: it belongs to another run.
        """
        for folder in self._folders():
            record = _read(folder)
            if record is None:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if different := differences(record["identity"], self._identity):
                raise InvalidField(
                    f"{folder} is from a run with other settings ({', '.join(different[:5])}): "
                    "use the same ones, start over with --overwrite, or choose another "
                    "output.dir",
                    metadata={"field": different[0], "cause": "another_run"},
                )
            return TrainerCheckpoint(folder, record["step"], record["facts"])
        return None

    @contextlib.contextmanager
    def saving(self, step: int, facts: Mapping[str, Any]) -> Iterator[Path]:
        """Yield a folder to write a checkpoint's files to. It becomes valid at the end of the
        block, and older ones are removed.

        Raises:
            DiskFull, CheckpointFailed: the files could not be written; older ones stay.
        """
        folder = self.root / f"{_PREFIX}{step}"
        try:
            with disk_errors(f"checkpoint {folder}", self.advice()):
                yield folder
                _record(folder, {"step": step, "facts": facts, "identity": self._identity})
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        for old in self._folders()[self._keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """The checkpoint folders, newest first."""
        found = [p for p in self.root.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdigit()]
        return sorted(found, key=lambda p: int(p.name[len(_PREFIX) :]), reverse=True)

    def advice(self) -> str:
        """What to do if a file of the run cannot be written."""
        whole = [folder for folder in self._folders() if (folder / RECORD).is_file()]
        if not whole:
            return "free some space and start again"
        return f"free some space and run the same command: it resumes from {whole[0].name}"


def last_step(root: Path) -> int | None:
    """The step of the newest complete checkpoint in a folder, from any run; None if there is
    none."""
    steps = [
        int(folder.name.removeprefix(_PREFIX))
        for folder in root.glob(f"{_PREFIX}*")
        if folder.name.removeprefix(_PREFIX).isdigit() and (folder / RECORD).is_file()
    ]
    return max(steps, default=None)


@contextlib.contextmanager
def disk_errors(what: str, advice: str) -> Iterator[None]:
    """Convert the exceptions of libraries that cannot write a file to our errors.

    Raises:
        DiskFull: the disk is full.
        CheckpointFailed: any other failure of the system or a library.
    """
    try:
        yield
    except VeneerError:
        raise
    except (OSError, RuntimeError) as error:
        raise _write_error(error, what, advice) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("safetensors", "safetensors_rust"):
            raise
        raise _write_error(error, what, advice) from error


def _write_error(error: Exception, what: str, advice: str) -> VeneerError:
    text = str(error)
    full = isinstance(error, OSError) and error.errno in _FULL
    # safetensors and torch report a full disk only in their messages.
    if full or "No space left" in text or "os error 28" in text:
        return DiskFull(
            f"{what} could not be written, the disk is full: {advice}", metadata={"what": what}
        )
    return CheckpointFailed(
        f"{what} could not be written ({text}): {advice}", metadata={"what": what}
    )


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted names of the values that differ between two trees of plain values."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return [] if one == other else [prefix.rstrip(".")]
    found: list[str] = []
    for key in sorted({*one, *other}):
        found += differences(one.get(key), other.get(key), f"{prefix}{key}.")
    return found


def _record(folder: Path, facts: dict[str, Any]) -> None:
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            files[str(path.relative_to(folder))] = file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
    replace_file(folder / RECORD, json.dumps({**facts, "files": files}))
    sync(folder.parent)


def _read(folder: Path) -> dict[str, Any] | None:
    """The record; None if there is none, or a file does not match it."""
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_bytes())
        whole = all(
            _digest(folder / name) == digest for name, digest in record["files"].items()
        )
        return record if whole else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
