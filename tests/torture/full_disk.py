"""Publish on a disk that is really full: the third part of row 5.

``python -m tests.torture.full_disk FOLDER ADAPTERS LEAVES`` mounts a small tmpfs (in a private
mount namespace, so that it ends with the process). For each number of bytes in LEAVES, it fills
the disk until that many are left, publishes, frees space, and publishes again.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from veneer_registry.errors import DiskFull, VeneerError
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights

from tests.torture.faults import residue
from tests.torture.history import make_contents, open_registry
from tests.torture.row import Outcome, Scale
from tests.torture.syscalls import ROOT
from tests.unit.registry.kit import push

SIZE = 2 << 20


def fill(folder: Path, leave: int) -> Path:
    """Fill the disk until ``leave`` bytes are left."""
    filler = folder / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(folder).free - leave))
    return filler


def whole(registry: Registry, name: str) -> str:
    """Return the current revision of ``name``, after verifying all its content."""
    ref = registry.resolve(name)
    verify_weights(registry.weights_folder(ref), ref.weights_digest)
    return ref.revision


def play(folder: Path, adapters: Path, leaves: list[int]) -> dict[str, Any]:
    """Publish at each level; return failures and counts of answers."""
    failures, answers = [], {"published": 0, "DiskFull": 0, "other": 0}
    data = folder / "data"
    registry = open_registry(data)
    push(registry, "keep", adapters / "0")
    kept = whole(registry, "keep")
    for number, leave in enumerate(leaves):
        content = adapters / str(1 + number % 2)
        filler = fill(folder, leave)
        try:
            push(registry, "chat", content, allow_replace=True)
            answers["published"] += 1
        except DiskFull:
            answers["DiskFull"] += 1
        except Exception as error:
            answers["other"] += 1
            failures.append(f"{leave} bytes left: {type(error).__name__}: {error}")
        if whole(registry, "keep") != kept:
            failures.append(f"{leave} bytes left: another name changed")
        filler.unlink()
        try:
            now = push(registry, "chat", content, allow_replace=True).record.ref.revision
            if whole(registry, "chat") != now:
                failures.append(f"{leave} bytes left: the next try gave something else")
            registry.sweep()
            registry.sweep_uploads(0)
            failures += [
                f"{leave} bytes left: {what} is left" for what in residue(data, registry)
            ]
        except (VeneerError, OSError) as error:
            failures.append(f"{leave} bytes left: then, with room, {error}")
        if number % 4 == 3:
            registry.close()
            registry = open_registry(data)
    registry.close()
    return {"failures": failures, "answers": answers}


def torture(scale: Scale) -> Outcome:
    """Run levels in steps of 4 KiB (full: 1 KiB), up to a level at which a publish fits."""
    work = scale.folder("full")
    make_contents(work / "adapters")
    (work / "disk").mkdir()
    step = scale.pick(4096, 1024)
    leaves = ",".join(map(str, range(0, 160 << 10, step)))
    command = [sys.executable, "-m", "tests.torture.full_disk"]
    command += [str(work / "disk"), str(work / "adapters"), leaves]
    apart = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    ended = subprocess.run(
        [*apart, *command], check=False, capture_output=True, text=True, cwd=ROOT
    )
    if "MOUNTED" not in ended.stdout:
        why = (ended.stderr.strip().splitlines() or ["unshare or mount is not allowed"])[-1]
        return Outcome("", "", (), (f"no small disk could be mounted here: {why[:150]}",))
    if ended.returncode != 0:
        return Outcome("", "", (f"full disk: the program died: {ended.stderr[-600:]}",))
    said = json.loads(ended.stdout.splitlines()[-1])
    answers = ", ".join(f"{what} {count}" for what, count in said["answers"].items())
    figure = f"{len(leaves.split(','))} levels of a full disk ({answers})"
    return Outcome(figure, "", tuple(said["failures"]))


def main() -> None:
    folder, adapters, leaves = sys.argv[1:]
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "veneer-torture", folder]
    subprocess.run(mount, check=True)
    print("MOUNTED", flush=True)
    print(json.dumps(play(Path(folder), Path(adapters), [int(n) for n in leaves.split(",")])))


if __name__ == "__main__":
    main()
