"""Checkpoints that no crash can tear, and runs that only go on as themselves.

A checkpoint is a folder that Trainer writes, file after file. It counts once a record lies
in it: the SHA-256 of each file, written last, by one rename, after the files reached the
disk. What a killed process leaves has none, and is swept. The record also
says what run this is; going on with other data, another base or another config would
give an adapter that no manifest describes.
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

__all__ = ["Checkpoint", "CheckpointFailed", "Checkpoints", "differences", "disk_errors"]

RECORD: Final = "veneer_checkpoint.json"
_PREFIX: Final = "checkpoint-"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT)


class CheckpointFailed(VeneerError):
    """A checkpoint could not be written (metadata ``what``)."""

    code = "INTERNAL"
    reason: ClassVar[str] = "CHECKPOINT_FAILED"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One that is whole.

    Attributes:
        step: optimiser steps done.
        facts: what the run wrote beside it.
    """

    folder: Path
    step: int
    facts: Mapping[str, Any]


class Checkpoints:
    """Those of one run, in a folder of their own.

    Args:
        identity: plain facts that must be equal for a run to go on from a checkpoint.
        keep: how many stay, the newest.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], *, keep: int) -> None:
        self.root = root
        self._identity = json.loads(json.dumps(identity))
        self._keep = keep

    def newest(self) -> Checkpoint | None:
        """The newest whole one; what is torn is removed.

        Raises:
            InvalidField: it is of another run.
        """
        for folder in self._folders():
            record = _read(folder)
            if record is None:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            if different := differences(record["identity"], self._identity):
                raise InvalidField(
                    f"{folder} is of a run with other settings ({', '.join(different[:5])}): "
                    "give it the same ones, train anew with --overwrite, or choose another "
                    "output.dir",
                    metadata={"field": different[0], "cause": "another_run"},
                )
            return Checkpoint(folder, record["step"], record["facts"])
        return None

    @contextlib.contextmanager
    def saving(self, step: int, facts: Mapping[str, Any]) -> Iterator[Path]:
        """Write a checkpoint's files into the folder that this gives; it counts from the end
        of the block on, and then older ones go.

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
        """Remove them all."""
        shutil.rmtree(self.root, ignore_errors=True)

    def _folders(self) -> list[Path]:
        """Newest first."""
        found = [p for p in self.root.glob(f"{_PREFIX}*") if p.name[len(_PREFIX) :].isdigit()]
        return sorted(found, key=lambda p: int(p.name[len(_PREFIX) :]), reverse=True)

    def advice(self) -> str:
        """What to do where a file of the run cannot be written."""
        whole = [folder for folder in self._folders() if (folder / RECORD).is_file()]
        if not whole:
            return "free some space and start again"
        return f"free some space and run the same command: it goes on from {whole[0].name}"


@contextlib.contextmanager
def disk_errors(what: str, advice: str) -> Iterator[None]:
    """Turn what libraries raise when a file cannot be written into errors of ours.

    Raises:
        DiskFull: there is no room.
        CheckpointFailed: anything else that the system or a library refused.
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
    # safetensors and torch say it in words alone.
    if full or "No space left" in text or "os error 28" in text:
        return DiskFull(
            f"{what} could not be written, the disk is full: {advice}", metadata={"what": what}
        )
    return CheckpointFailed(
        f"{what} could not be written ({text}): {advice}", metadata={"what": what}
    )


def differences(one: Any, other: Any, prefix: str = "") -> list[str]:
    """Dotted names of what differs between two trees of plain values."""
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
    """The record; None where there is none, or a file is not what it says."""
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
