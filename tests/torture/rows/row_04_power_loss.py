"""Row 4: open and check possible disk contents after a power cut."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from veneer_registry.adapter import AdapterRef
from veneer_registry.errors import ChecksumMismatch, VeneerError
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights

from tests.torture.disk_model import Choice, Disk
from tests.torture.history import (
    BROKEN_OFF,
    PLANTED,
    Promise,
    make_contents,
    open_registry,
    resume,
)
from tests.torture.row import Control, Outcome, Scale
from tests.torture.syscalls import missing_strace, trace
from tests.unit.registry.kit import push

ROW = 4
TITLE = "power loss"
BAR = "0 violations"


@dataclass(frozen=True, slots=True)
class Story:
    """A history to record.

    Attributes:
        seed: seed of the history and of the cuts.
        steps: number of changes in it.
        states: number of disks to judge.
        planted: a bug of `PLANTED`, or "".
        data: the data folder below the disk's root. "." is the root, which is durable; any
            other is created by the registry, which must make it durable.
    """

    seed: str
    steps: int
    states: int
    planted: str = ""
    data: str = "."


def record(work: Path, story: Story) -> Disk:
    """Run a history under strace."""
    adapters, disk = work / "adapters", work / "disk"
    make_contents(adapters)
    disk.mkdir()
    arguments = [str(disk / story.data), str(adapters), "--steps", str(story.steps)]
    arguments += ["--seed", story.seed]
    planted = story.planted
    arguments += ["--planted", planted] if planted else []
    status, _, errors, calls = trace(
        "tests.torture.history", arguments, work / "calls", reads=True
    )
    if status != 0:
        raise RuntimeError(f"the recorded history failed: {errors[-800:]}")
    return Disk(disk, calls)


def choices(disk: Disk, count: int, rng: random.Random) -> Iterator[tuple[str, Choice]]:
    """Yield ``count`` cuts, each with the changes that it keeps; the first one is at the end
    and keeps nothing.

    Of the changes that are not durable, a cut keeps none, all, only one, all but one, or a
    random half with torn writes.
    """
    ends = [disk.events + 1]
    cuts = ends + [rng.randrange(1, disk.events + 2) for _ in range(count - 1)]
    for number, cut in enumerate(cuts):
        pending = disk.pending(cut)
        one = rng.choice(pending) if pending else None
        half = frozenset(id(change) for change in pending if rng.random() < 0.5)
        match number % 6:
            case 0:
                yield "nothing kept", Choice(cut, lambda _: False)
            case 1:
                yield "all kept, torn", Choice(cut, lambda _: True, rng)
            case 2:
                yield "one kept", Choice(cut, lambda change, one=one: change is one)
            case 3:
                yield "one lost", Choice(cut, lambda change, one=one: change is not one)
            case 4:
                yield "half kept", Choice(cut, lambda change, half=half: id(change) in half)
            case _:
                torn = Choice(cut, lambda change, half=half: id(change) in half, rng)
                yield "half kept, torn", torn


def promises(disk: Disk, cut: int) -> list[Promise]:
    """Return the allowed states: the last one acknowledged before ``cut``, or the one after the
    change in flight.

    There is none if not even the first opening was acknowledged.
    """
    before = [(at, line) for at, line in disk.said if at < cut]
    after = [line for at, line in disk.said if at >= cut and line != "begin"]
    kept = [json.loads(line) for _, line in before if line != "begin"][-1:]
    under_way = not before or before[-1][1] == "begin"
    return kept + ([json.loads(after[0])] if under_way and after else [])


def judge(data: Path, allowed: list[Promise], adapter: Path) -> str:
    """Return what is wrong with this disk, or ""."""
    try:
        with open_registry(data) as registry:
            return _differs(registry, allowed) or _goes_on(registry, adapter)
    except (VeneerError, OSError, sqlite3.Error) as error:
        return f"{type(error).__name__}: {error}"


def _goes_on(registry: Registry, adapter: Path) -> str:
    """Check that an interrupted upload resumes or is refused, and that publishing works."""
    resumed = None
    with contextlib.suppress(ChecksumMismatch):
        resumed = resume(registry, BROKEN_OFF, adapter)
        ref = registry.resolve(BROKEN_OFF)
        verify_weights(registry.weights_folder(ref), ref.weights_digest)
    whole = push(registry, "afterwards", adapter).record.ref.revision
    if resumed not in (None, whole):
        return "a resumed upload was published with other bytes"
    return ""


def _differs(registry: Registry, allowed: list[Promise]) -> str:
    found = {
        record.ref.name: [old.ref for old in registry.revisions(record.ref.name)]
        for record in registry.list()
    }
    for refs in found.values():
        for ref in refs:
            verify_weights(registry.weights_folder(ref), ref.weights_digest)
    aliases = (f"{alias.name}/{alias.alias}" for alias in registry.aliases())
    current = {name: registry.resolve(name).revision for name in (*found, *aliases)}
    reasons = [_misses(promise, found, current) for promise in allowed]
    if not reasons or "" in reasons:
        return ""
    return " / ".join(reasons)


def _misses(
    promise: Promise, found: dict[str, list[AdapterRef]], current: dict[str, str]
) -> str:
    wanted = {name: revisions[0] for name, revisions in promise.items()}
    if wanted != current:
        short = [{n: r[:8] for n, r in names.items()} for names in (wanted, current)]
        return f"promised {short[0]}, found {short[1]}"
    for name, revisions in promise.items():
        lost = set(revisions) - {ref.revision for ref in found[name.partition("/")[0]]}
        if lost:
            return f"{name} lost an older revision"
    return ""


def torture(work: Path, story: Story) -> Outcome:
    """Record a history, and judge possible disks after it."""
    disk = record(work, story)
    failures, pending, states = [], 0, story.states
    rng = random.Random(story.seed)
    for number, (what, choice) in enumerate(choices(disk, states, rng)):
        target = work / "state"
        target.mkdir()
        disk.build(choice, target)
        pending += len(disk.pending(choice.cut))
        allowed = promises(disk, choice.cut)
        wrong = judge(target / story.data, allowed, work / "adapters" / BROKEN_OFF)
        if wrong:
            place = f"seed {story.seed!r}, state {number}, cut at {choice.cut}, {what}"
            failures.append(f"{place}, folder {story.data}: {wrong}")
        shutil.rmtree(target)
    figure = (
        f"{states} disks of {disk.events} recorded operations, {pending / states:.0f} of them "
        f"open at a cut on average; {len(failures)} violations"
    )
    return Outcome(figure, BAR, tuple(failures))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence recovery's warnings about its findings, which are normal here."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def run(scale: Scale) -> Outcome:
    """Judge 600 disks of six histories, or 60 of two."""
    if missing_strace():
        return Outcome("", BAR, skipped=missing_strace())
    stories = [
        Story(f"{scale.seed} {number}", steps=12, states=scale.pick(50, 110))
        for number in range(scale.pick(1, 5))
    ]
    stories.append(Story(f"{scale.seed} made", 4, scale.pick(10, 50), data="made/by/us"))
    with quiet():
        parts = [torture(scale.folder(str(n)), story) for n, story in enumerate(stories)]
    failures = tuple(failure for part in parts for failure in part.failures)
    return Outcome("; ".join(part.figure for part in parts), BAR, failures)


def controls(scale: Scale) -> Iterator[Control]:
    """Use the same judge on programs that omit an fsync."""
    for number, planted in enumerate(PLANTED):
        with quiet():
            story = Story(str(scale.seed), steps=3, states=12, planted=planted)
            found = torture(scale.folder(str(number)), story)
        yield Control.of(planted, found)
