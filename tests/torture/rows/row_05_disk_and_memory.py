"""Row 5: full disk, I/O errors and out of memory, at each point in turn."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.torture import full_disk, no_memory
from tests.torture.faults import PLANTED, make_contents
from tests.torture.history import open_registry
from tests.torture.row import Control, Outcome, Scale
from tests.torture.syscalls import Call, missing_strace, trace

ROW = 5
TITLE = "disk full, I/O errors, out of memory"
BAR = "no false acknowledgement, others served, no residue, the next try succeeds"
BROKEN = ("openat", "write", "pwrite64", "ftruncate", "fsync", "fdatasync", "rename", "mkdir")
SYNCS = ("fsync", "fdatasync")


@dataclass(frozen=True, slots=True)
class Fault:
    """The ``number``-th call of this name fails with ``error``; ``path`` is for messages."""

    call: str
    number: int
    error: str
    path: str

    @property
    def inject(self) -> str:
        return f"{self.call}:error={self.error}:when={self.number}"


def places(calls: Iterable[Call], data: Path) -> list[Call]:
    """Return the calls that belong to a change: between ``begin`` and ``end``, on the data
    folder."""
    found, inside = [], False
    opened: dict[str, str] = {}
    for call in calls:
        if call.name == "write" and call.arguments[0] == "1":
            inside = b'"begin"' in call.arguments[1]
            continue
        path = call_path(call, opened)
        if inside and call.name in BROKEN and path.startswith(str(data)):
            found.append(call)
    return found


def call_path(call: Call, opened: dict[str, str]) -> str:
    """Return the path that the call concerns; update ``opened`` (descriptor -> path)."""
    if call.name == "openat":
        path = call.path(1)
        if call.result >= 0:
            opened[str(call.result)] = path
        return path
    if not call.arguments:
        return ""
    first = call.arguments[0]
    return call.path(0) if isinstance(first, bytes) else opened.get(first, "")


def faults(calls: list[Call], data: Path) -> list[Fault]:
    """Return every call with both errors, except that opening for reading has no ENOSPC."""
    opened: dict[str, str] = {}
    paths = {(call.name, call.number): call_path(call, opened) for call in calls}
    found = []
    for call in places(calls, data):
        reads = call.name == "openat" and "O_CREAT" not in call.arguments[2]
        path = Path(paths[call.name, call.number]).relative_to(data)
        for error in ("EIO",) if reads else ("ENOSPC", "EIO"):
            found.append(Fault(call.name, call.number, error, str(path)))
    return found


def break_once(
    work: Path, adapters: Path, fault: Fault, planted: str = ""
) -> tuple[list[str], str]:
    """Run the program with one fault; return failures and the resulting error."""
    data = work / "data"
    arguments = [str(data), str(adapters), *(["--planted", planted] if planted else [])]
    log = work / "calls"
    status, out, errors, calls = trace(
        "tests.torture.faults", arguments, log, inject=fault.inject
    )
    events = [json.loads(line) for line in out.splitlines()]
    wrong = []
    if status != 0:
        wrong.append(f"the program died: {errors.strip().splitlines()[-1][:200]}")
    elif not any(call.injected for call in calls):
        wrong.append("the fault was not injected: this run differs from the first")
    else:
        wrong += judge(data, fault, events)
    shutil.rmtree(data, ignore_errors=True)
    refusals = [event for event in events if "error" in event and event["event"] == "end"]
    said = f"{refusals[0]['error']} {refusals[0]['code']}".strip() if refusals else ""
    return [f"{fault.inject} ({fault.path}): {what}" for what in wrong], said


def judge(data: Path, fault: Fault, events: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong with the program's output and with the files that it left."""
    wrong = [
        f"after {event['after']}: {event.get('name', '')} {event['error']}"
        for event in events
        if event["event"] == "broken"
    ]
    refused = any("error" in event for event in events if event["event"] == "end")
    inside_sqlite = fault.path.startswith("catalog.sqlite")
    if fault.call in SYNCS and not refused and not inside_sqlite:
        wrong.append("acknowledged although the fsync had failed")
    if not wrong and not any(event["event"] == "promised" for event in events):
        wrong.append("the program did not come to its end")
    for event in events:
        if event["event"] == "left" and event["residue"]:
            wrong.append(f"left behind: {event['residue']}")
        if event["event"] == "promised":
            with open_registry(data) as registry:
                found = {r.ref.name: r.ref.revision for r in registry.list()}
            if found != event["names"]:
                wrong.append(f"promised {sorted(event['names'])}, found {sorted(found)}")
    return wrong


def torture_disk(
    work: Path, most: int, rng: random.Random, planted: str = "", only: str = ""
) -> Outcome:
    """Inject up to ``most`` faults, evenly over the kinds; ``only``: only in calls of this
    name."""
    adapters = work / "adapters"
    make_contents(adapters)
    arguments = [str(work / "data"), str(adapters)]
    status, _, errors, calls = trace("tests.torture.faults", arguments, work / "calls")
    if status != 0:
        raise RuntimeError(f"the program failed without any fault: {errors[-800:]}")
    everything = [f for f in faults(calls, work / "data") if only in ("", f.call)]
    shutil.rmtree(work / "data")
    chosen = pick(everything, most, rng)
    failures: list[str] = []
    refusals: Counter[str] = Counter()
    for fault in chosen:
        wrong, said = break_once(work, adapters, fault, planted)
        failures += wrong
        refusals[f"{fault.error}: {said or 'no refusal needed'}"] += 1
    figure = f"{len(chosen)} of {len(everything)} faults, {len(failures)} violations"
    said = ", ".join(f"{what} x{count}" for what, count in sorted(refusals.items()))
    return Outcome(figure, BAR, tuple(failures), (f"answers to one failed call: {said}",))


def pick(everything: list[Fault], most: int, rng: random.Random) -> list[Fault]:
    """Pick at most ``most`` faults, taken in turn from each kind of call and error."""
    kinds: dict[tuple[str, str], list[Fault]] = {}
    for fault in rng.sample(everything, len(everything)):
        kinds.setdefault((fault.call, fault.error), []).append(fault)
    chosen: list[Fault] = []
    while len(chosen) < min(most, len(everything)):
        for faults_left in kinds.values():
            if faults_left and len(chosen) < most:
                chosen.append(faults_left.pop())
    return chosen


def run(scale: Scale) -> Outcome:
    """Test faults in every place (quick: 20 places), a full disk, and memory that runs out."""
    parts = [no_memory.torture(scale), full_disk.torture(scale)]
    notes: tuple[str, ...] = ()
    if missing_strace():
        notes = (f"system calls were not broken: {missing_strace()}",)
    else:
        most = scale.pick(20, 100_000)
        parts.append(torture_disk(scale.folder("calls"), most, scale.random("disk")))
    return Outcome(
        "; ".join(part.figure for part in parts if part.figure),
        BAR,
        tuple(failure for part in parts for failure in part.failures),
        notes + tuple(note for part in parts for note in part.notes),
    )


def controls(scale: Scale) -> Iterator[Control]:
    """Use the same judges on a registry that ignores one kind of failure."""
    if not missing_strace():
        for planted, only in zip(PLANTED, ("fsync", "rename"), strict=True):
            found = torture_disk(scale.folder(only), 6, scale.random(), planted, only=only)
            yield Control.of(planted, found)
    yield no_memory.control(scale)
