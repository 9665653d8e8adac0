"""Row 24: judge stored responses on possible disks after a power cut or kill -9."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from veneer_registry.errors import VeneerError
from veneer_server.openai.errors import HttpError
from veneer_server.openai.response_store import FinishedResponse, ResponseDatabase, StoredItem

from tests.torture.disk_model import Disk
from tests.torture.row import Control, Outcome, Scale
from tests.torture.rows.row_04_power_loss import choices, promises, quiet
from tests.torture.stored_history import PLANTED, Found, found_in, miscounted, open_database
from tests.torture.syscalls import missing_strace, trace

ROW = 24
TITLE = "power loss and stored responses"
BAR = "0 violations"


def record(work: Path, seed: str, steps: int, planted: str = "") -> Disk:
    """Run a history under strace."""
    disk = work / "disk"
    disk.mkdir()
    arguments = [str(disk), "--steps", str(steps), "--seed", seed]
    arguments += ["--planted", planted] if planted else []
    status, _, errors, calls = trace(
        "tests.torture.stored_history", arguments, work / "calls", reads=True
    )
    if status != 0:
        raise RuntimeError(f"the recorded history failed: {errors[-800:]}")
    return Disk(disk, calls)


def judge(data: Path, allowed: list[Found], steps: int) -> str:
    """Return what is wrong with this disk, or ""."""
    try:
        with contextlib.closing(open_database(data)) as database:
            return _differs(database, allowed, steps)
    except (VeneerError, HttpError, OSError, sqlite3.Error) as error:
        return f"{type(error).__name__}: {error}"


def _differs(database: ResponseDatabase, allowed: list[Found], steps: int) -> str:
    if list(database.path.parent.glob("*damaged*")):
        return "called damaged, and moved aside"
    found = found_in(database, steps)
    if allowed and found not in allowed:
        return f"promised {[sorted(each) for each in allowed]}, found {sorted(found)}"
    if wrong := miscounted(database):
        return wrong
    item = StoredItem("i", b'{"id":"i"}')
    if not database.put("a", FinishedResponse("new", None, None, b"{}", [item], [item])):
        return "no response can be stored any more"
    return "" if database.response("a", "new") else "what was stored then is not there"


def torture(work: Path, seed: str, steps: int, states: int, planted: str = "") -> Outcome:
    """Record a history, and judge possible disks after it."""
    disk = record(work, seed, steps, planted)
    failures, rng = [], random.Random(seed)
    for number, (what, choice) in enumerate(choices(disk, states, rng)):
        target = work / "state"
        target.mkdir()
        disk.build(choice, target)
        allowed = [dict(each) for each in promises(disk, choice.cut)]
        if wrong := judge(target, allowed, steps):
            failures.append(f"seed {seed!r}, state {number}, cut {choice.cut}, {what}: {wrong}")
        shutil.rmtree(target)
    figure = f"{states} disks of {disk.events} operations; {len(failures)} violations"
    return Outcome(figure, BAR, tuple(failures))


def run(scale: Scale) -> Outcome:
    """Judge 600 disks of six histories, or 20 of one."""
    if missing_strace():
        return Outcome("", BAR, skipped=missing_strace())
    with quiet():
        parts = [
            torture(scale.folder(str(n)), f"{scale.seed} {n}", 20, scale.pick(20, 100))
            for n in range(scale.pick(1, 6))
        ]
    failures = tuple(failure for part in parts for failure in part.failures)
    return Outcome("; ".join(part.figure for part in parts), BAR, failures)


def controls(scale: Scale) -> Iterator[Control]:
    """Use the same judge on programs with a planted bug."""
    for number, planted in enumerate(PLANTED):
        with quiet():
            folder = scale.folder(str(number))
            found = torture(folder, str(scale.seed), 6, 18, planted)
        yield Control.of(planted, found)
