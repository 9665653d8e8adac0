"""Row 3: kill -9 at any moment of uploads and changes; the next server has all acknowledged
changes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from veneer_registry.bundle_files import REQUIRED_FILES
from veneer_registry.upkeep import verify
from veneer_server.models.source import import_bundled

from tests.places import cache_dir
from tests.torture.kill_clients import Client, Content, Killed, make_contents
from tests.torture.killed_front import PLANTED
from tests.torture.row import Control, Outcome, Scale
from tests.torture.syscalls import ROOT

ROW = 3
TITLE = "kill -9 of the front"
SECONDS = 5
BAR = (
    "0 torn adapters; all that was acknowledged is there (names, bytes, aliases, labels, "
    f"pins); uploads go on from where they were told; ready in < {SECONDS} s"
)
OWN = ("chat", "code")
"""Names that share no content with other names, and that pin."""
SHARING = ("legal", "mail")
"""Names with the same contents."""
LONGEST_S = 0.6
"""Longest time that a front may work before it is killed."""
POINTS = 400
"""A front dies at one of its first ``POINTS`` changes of the data folder, or earlier by the
clock."""
MOMENTS = ("while starting", "at a change of the folder", "by the clock")

SHOWS = {
    "acknowledged before the catalog's commit": "acknowledged",
    "uploads are emptied at start": r"GetUpload: 0 .*\d$",
    "pins are written down later": "pins lost",
}
"""The failure that only this planted bug causes."""
KINDS = {
    "torn": "is torn",
    "names": "acknowledged",
    "pins": "pins lost",
    "uploads": "GetUpload",
}


class Front:
    """A `tests.torture.killed_front` process that has imported everything and waits for
    `go`."""

    def __init__(self, work: Path, planted: str) -> None:
        cache = cache_dir()
        base = import_bundled(cache).path
        command = [sys.executable, "-m", "tests.torture.killed_front", str(base), str(cache)]
        command += [str(work / "data"), *(["--planted", planted] if planted else [])]
        self._log = (work / "front.log").open("a")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
        )
        self.import_s = 0.0
        self.address = ""

    def go(self, point: int) -> None:
        self.import_s = self._said().get("imported", 0.0)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{point}\n")
            self.process.stdin.flush()

    def ready(self) -> dict[str, float] | None:
        """Return the seconds until it is ready, including imports; None if it died before."""
        told = self._said()
        if not told:
            return None
        self.address = str(told["grpc"])
        return {"wall": self.import_s + told["ready"], "cpu": told["cpu"]}

    def dead(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self._log):
            with suppress(OSError):
                pipe and pipe.close()

    def _said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline() or "{}")


class Kills:
    """Runs fronts one after another on one data folder, and keeps the clients' record."""

    def __init__(self, scale: Scale, name: str, planted: str = "") -> None:
        self.work = scale.folder(name)
        self.planted = planted
        self.rng = scale.random(name)
        self.seed = scale.seed
        adapters = self.work / "adapters"
        own = {
            each: make_contents(adapters / each, [10 * i, 10 * i + 1, 10 * i + 2])
            for i, each in enumerate(OWN, 1)
        }
        shared = make_contents(adapters / "shared", [91, 92, 93])
        contents: dict[str, list[Content]] = {**own, **dict.fromkeys(SHARING, shared)}
        self.clients = [
            Client(each, made, scale.random(f"{name} {each}"), pinning=each in OWN)
            for each, made in contents.items()
        ]
        self.failures: list[str] = []
        self.starts: list[dict[str, float]] = []
        self.moments: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.lost = False
        """Whether something is so wrong that no more can be judged."""

    def run(self, count: int, until: str = "") -> Outcome:
        """Kill ``count`` times; then start once more and check.

        Args:
            until: a pattern; stop at the first failure that matches it, and count only matching
                failures.
        """
        front = spare = Front(self.work, self.planted)
        try:
            for number in range(count + 1):
                # The next front imports while this one works.
                front, spare = spare, Front(self.work, self.planted)
                self._one(front, number, last=number == count)
                if until:
                    self.failures = [f for f in self.failures if re.search(until, f)]
                if self.lost or (until and self.failures):
                    break
        finally:
            front.kill()
            spare.kill()
        for client in self.clients:
            self.calls.update(client.counts)
        return self._outcome(sum(self.moments[each] for each in MOMENTS))

    def _one(self, front: Front, number: int, *, last: bool) -> None:
        point = self.rng.randrange(1, POINTS) if self.rng.random() < 0.7 and not last else 0
        front.go(point)
        ready = front.ready()
        if ready is None:
            if front.process.wait() != -9:
                log = (self.work / "front.log").read_text()[-1500:]
                self._fail(number, point, f"the front did not start: {log}")
                self.lost = True
            self.moments["while starting"] += 1
            return
        self.starts.append(ready)
        with grpc.insecure_channel(front.address) as channel:
            for client in self.clients:
                client.connect(channel, front.dead)
            with suppress(Killed):
                self._judge()
            if not last and not self.lost:
                self._let_work(front)
        for client in self.clients:
            for failure in client.failures:
                self._fail(number, point, failure)
            client.failures.clear()
        front.kill()

    def _judge(self) -> None:
        try:
            for client in self.clients:
                client.judge()
        except LookupError:
            self.lost = True
            return
        for client in self.clients:
            client.failures += not_whole(self.work / "data", client)
        found = verify(self.work / "data")
        staged = list((self.work / "data" / "store" / "staging").iterdir())
        wrong = [f"{each.kind} {each.digest[:12]}: {each.why}" for each in found.damaged]
        if found.unreferenced or staged:
            wrong.append(f"{found.unreferenced} unreferenced, {len(staged)} in staging")
        self.clients[0].failures += wrong

    def _let_work(self, front: Front) -> None:
        threads = [threading.Thread(target=client.work) for client in self.clients]
        for thread in threads:
            thread.start()
        with suppress(subprocess.TimeoutExpired):
            front.process.wait(self.rng.uniform(0.02, LONGEST_S))
        self.moments["at a change of the folder" if front.dead() else "by the clock"] += 1
        front.process.kill()
        front.process.wait()
        for thread in threads:
            thread.join()
        for client in self.clients:
            if client.under_way is not None:
                self.moments[f"in {client.under_way.what}"] += 1

    def _fail(self, number: int, point: int, what: str) -> None:
        self.failures.append(f"seed {self.seed}, start {number}, point {point}: {what}")

    def _outcome(self, kills: int) -> Outcome:
        walls, cpu = ([start[each] for start in self.starts] for each in ("wall", "cpu"))
        # On a busy machine a single start may be late through no fault of the server.
        if min(walls) > SECONDS or max(cpu) > SECONDS:
            self.failures.append(
                f"ready after {min(walls):.1f} s at least, {max(cpu):.1f} s of CPU at most"
            )
        moments = ", ".join(f"{each} {self.moments[each]}" for each in MOMENTS)
        under_way = {k: v for k, v in self.moments.items() if k not in MOMENTS}
        figure = (
            f"{kills} kills ({moments}) in {sum(self.calls.values())} acknowledged calls, "
            f"{sum(under_way.values())} calls cut short; {len(self.failures)} violations; "
            f"ready in {median(walls):.1f} s (median; most {max(walls):.1f} s, "
            f"{max(cpu):.1f} s of CPU)"
        )
        notes = tuple(
            f"{title}: {', '.join(f'{each} {count}' for each, count in counts.most_common())}"
            for title, counts in (("calls", self.calls), ("cut short", Counter(under_way)))
        )
        kinds = {kind: sum(word in f for f in self.failures) for kind, word in KINDS.items()}
        broken = f"violations: {', '.join(f'{kind} {n}' for kind, n in kinds.items())}"
        return Outcome(figure, BAR, tuple(self.failures), (broken, *notes))


def not_whole(data: Path, client: Client) -> list[str]:
    """Return files of kept revisions that differ from the files sent."""
    wrong = []
    for number in client.state.kept:
        content = client.contents[number]
        for file, expected in content.files.items():
            kind = ("weights", content.weights) if file in REQUIRED_FILES else None
            folder = data / "store" / Path(*(kind or ("revisions", content.revision)))
            with suppress(OSError):
                if (folder / file).read_bytes() == expected:
                    continue
            wrong.append(f"{client.name}: {file} of {content.revision[:12]} is torn or gone")
    return wrong


def run(scale: Scale) -> Outcome:
    """Kill 500 times, or 12."""
    return Kills(scale, "kills").run(scale.pick(12, 500))


def controls(scale: Scale) -> Iterator[Control]:
    """Use the same checks on fronts that lose changes."""
    for planted in list(PLANTED)[: scale.pick(2, None)]:
        # Kill times are random: a second or third run may be needed.
        for attempt in range(3):
            kills = Kills(scale, f"{planted} {attempt}", planted)
            found = kills.run(scale.pick(12, 40), SHOWS[planted])
            if found.failures:
                break
        yield Control.of(planted, found)
