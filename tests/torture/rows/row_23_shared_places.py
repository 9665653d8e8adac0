"""Row 23: rows 3 to 5 for a catalog in PostgreSQL and a store of objects.

Two registries publish while one of them is killed, the database is killed, or the object store
fails, and while answers to COMMIT are lost. Afterwards everything acknowledged must be there,
and nothing may be half visible.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from veneer_registry.errors import VeneerError
from veneer_registry.registry import Registry
from veneer_registry.rows import HistoryRow
from veneer_registry.stored_adapter import verify_weights

from tests.shared_services import BUCKET, Services, running
from tests.torture.row import Control, Outcome, Scale
from tests.torture.shared_worker import PLANTED, RETAIN, places
from tests.torture.syscalls import ROOT
from tests.unit.registry.kit import BASE, make_adapter

ROW = 23
TITLE = "kills and faults with PostgreSQL and S3"
BAR = (
    "each acknowledged publication is in the history of a new registry, with its content "
    "whole; nothing that is listed lacks content; the history has no gap"
)
EVENTS = ("a registry", "the database", "cut", "lose", "refuse", "hang")
ADAPTERS = 6


class Worker:
    """A `shared_worker` process, and the answers that it got."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.acknowledged: list[tuple[str, str]] = []
        self.refused: Counter[str] = Counter()
        self._more = threading.Condition()
        self._count = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.shared_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        self._errors: list[str] = []
        self._threads = [threading.Thread(target=t) for t in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.endswith("\n"):
                break  # killed while printing this line: nothing was acknowledged
            kind, *rest = line.split()
            with self._more:
                self._count += 1
                if kind == "new":
                    self.acknowledged.append((rest[0], rest[1]))
                elif kind == "no":
                    self.refused[rest[1]] += 1
                self._more.notify_all()
        with self._more:
            self._count = 1 << 30
            self._more.notify_all()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self._errors += self.process.stderr.readlines()

    def wait(self, count: int) -> None:
        """Wait for ``count`` more lines, or the worker's end."""
        with self._more:
            wanted = self._count + count
            self._more.wait_for(lambda: self._count >= wanted, 60)

    def kill(self) -> str:
        """Kill the worker; if it had ended by itself, return its errors."""
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return "" if alive else "".join(self._errors)[-800:]


class Round:
    """One round: two workers on a new catalog and store, one fault, and the judgement."""

    def __init__(self, services: Services, work: Path, name: str, bug: str) -> None:
        self._services, self._work, self._name, self._bug = services, work, name, bug
        self.adapters = [work.parent / f"adapter-{n}" for n in range(ADAPTERS)]
        self.given = {
            "store": f"s3://{BUCKET}/{name}",
            "endpoint": services.s3.endpoint,
            "catalog": services.postgres.url,
            "password_file": str(services.postgres.password_file),
            "schema": f"t_{name}",
            "adapters": [str(path) for path in self.adapters],
            "planted": bug,
        }

    def run(self, event: str, rng: Any) -> tuple[list[str], int, Counter[str]]:
        """Run the round; return failures, the number of acknowledged publications, and refusals
        by reason."""
        workers = [
            Worker(
                {
                    **self.given,
                    "data": str(self._work / f"own-{n}"),
                    "names": [f"name-{n}", "both"],
                    "seed": f"{rng.random()}",
                }
            )
            for n in range(2)
        ]
        failures = []
        try:
            for worker in workers:
                worker.wait(1)
            workers[0].wait(rng.randrange(1, 4))
            self._wrong(event, workers[0], rng)
            for worker in workers:
                worker.wait(rng.randrange(1, 4))
        finally:
            self._services.s3.fail()
            for n, worker in enumerate(workers):
                if said := worker.kill():
                    failures += [] if n == 0 and event == EVENTS[0] else [f"it ended: {said}"]
        told = [each for worker in workers for each in worker.acknowledged]
        failures += self._judge(told)
        reasons = sum((worker.refused for worker in workers), Counter[str]())
        return [f"{event}: {failure}" for failure in failures], len(told), reasons

    def _wrong(self, event: str, worker: Worker, rng: Any) -> None:
        # At any moment of a publication, not only between two publications.
        threading.Event().wait(rng.random() * 0.3)
        if event == "a registry":
            worker.process.kill()
        elif event == "the database":
            self._services.postgres.kill()
            self._services.postgres.start()
        else:
            self._services.s3.fail(
                kind=event, skip=rng.randrange(6), count=rng.randrange(1, 12), seconds=0.5
            )

    def _judge(self, told: list[tuple[str, str]]) -> Iterator[str]:
        data = self._work / "judge"
        try:
            registry = Registry.open(
                data, BASE, places=places(self.given, data), retain_superseded=RETAIN
            )
        except VeneerError as error:
            yield f"a new registry cannot be opened: {error}"
            return
        with registry:
            history = registry.history(limit=1000)[::-1]
            yield from _gaps(history)
            known = Counter(
                (line.name, line.revision)
                for line in history
                if line.event in ("published", "replaced")
            )
            for (name, revision), times in Counter(told).items():
                if times > known[name, revision]:
                    yield (
                        f"acknowledged {times} times, but made {known[name, revision]} times: "
                        f"{name}@{revision[:12]}"
                    )
            for name in sorted({record.ref.name for record in registry.list()}):
                for record in registry.revisions(name):
                    try:
                        with registry.acquire(f"{name}@{record.ref.revision}") as lease:
                            registry.fetch(lease.ref)
                            verify_weights(
                                registry.weights_folder(lease.ref), lease.ref.weights_digest
                            )
                    except VeneerError as error:
                        yield f"listed, but without content: {record.ref.short}: {error}"


def _gaps(history: tuple[HistoryRow, ...]) -> Iterator[str]:
    numbers = [line.sequence for line in history]
    if numbers != list(range(1, len(numbers) + 1)):
        yield f"the history has gaps or repeats: {numbers}"


def _tortured(
    scale: Scale, name: str, rounds: int, bug: str = "", events: Any = EVENTS
) -> Outcome:
    work, rng = scale.folder(name), scale.random(name)
    for n in range(ADAPTERS):
        make_adapter(work / f"adapter-{n}", seed=n)
    failures: list[str] = []
    acknowledged, happened, reasons = 0, Counter[str](), Counter[str]()
    with running() as services:
        for number in range(rounds):
            event = events[number % len(events)]
            folder = work / f"round-{number}"
            folder.mkdir()
            found, told, refused = Round(
                services, folder, f"r{number}-{name.replace(' ', '-')}"[:40], bug
            ).run(event, rng)
            failures += [f"round {number} (seed {scale.seed}): {each}" for each in found]
            acknowledged += told
            happened[event] += 1
            reasons += refused
            if bug and failures:
                break
    return Outcome(
        f"{rounds} rounds ({', '.join(f'{n} {event}' for event, n in happened.items())}): "
        f"{acknowledged} publications acknowledged, {reasons.total()} refused, "
        f"{len(failures)} failures",
        BAR,
        tuple(failures),
    )


def run(scale: Scale) -> Outcome:
    """Run each kind of event in turn; the first three in the quick form."""
    return _tortured(scale, "run", scale.pick(3, 120))


def controls(scale: Scale) -> Iterator[Control]:
    """Plant bugs that the check must find."""
    for number, bug in enumerate(PLANTED):
        outcome = _tortured(scale, f"planted {number}", 4, bug, EVENTS[:1])
        yield Control.of(bug, outcome)
