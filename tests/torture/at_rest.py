"""Damage single files and folders of a server's data and cache, and check the consequences.

After any damage:

- no start ends in a crash or a traceback; a refusal is one sentence with a fix
- no answer is wrong: a name gives the same tokens as on the undamaged server, or is refused
- no adapter content is deleted: all its files are still below the data folder
- a damaged cache is rebuilt: the first start serves everything, and the second start has
  nothing to report
- the fix works: after restoring the file, running the message's command, or pushing the
  adapter again, everything is served as before
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tests.torture.syscalls import ROOT

ADAPTERS: Final = {"chat": 1, "code": 2, "mail": 1, "sql": 3}
"""Name -> seed of its weights; two names share their weights."""
NAMES: Final = ("", *ADAPTERS)
REFUSED: Final = {"DATA_LOSS", "FAILED_PRECONDITION"}
"""Codes with which a name with damaged content or a damaged row may be refused."""
RECOVER: Final = "store recover"
LONGEST_MESSAGE: Final = 600

Answers = dict[str, Any]


class Worker:
    """A `tests.torture.at_rest_worker` process.

    Attributes:
        planted: name of the bug planted in starts from now on; "" for none.
    """

    def __init__(self, base: str) -> None:
        self.planted = ""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.torture.at_rest_worker", base],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n", "the worker did not start"

    def start(self, folder: Path, **asked: Any) -> Answers:
        """Start a server once on ``folder``; see the worker for the result."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        asked |= {"folder": str(folder), "names": NAMES, "planted": self.planted}
        line = json.dumps(asked)
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        said = self._process.stdout.readline()
        assert said, "the worker ended"
        return dict(json.loads(said))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


@dataclass(frozen=True, slots=True)
class Golden:
    """Undamaged folders, and the answers of a server on them.

    Attributes:
        folders: "stopped": after a clean stop; "killed": as a crash leaves it.
        answers: name -> tokens.
        adapters: name -> folder to push.
    """

    folders: dict[str, Path]
    answers: dict[str, list[int]]
    adapters: dict[str, Path]


@dataclass(frozen=True, slots=True)
class Damage:
    """A kind of damage to a file or folder.

    Attributes:
        golden: name of the golden folder.
        path: path of the file or folder, relative to it.
        how: removed, emptied, halved or flipped.
        at: byte and bit, for a flip.
    """

    golden: str
    path: str
    how: str
    at: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        at = f" (byte {self.at[0]}, bit {self.at[1]})" if self.how == "flipped" else ""
        return f"{self.golden}: {self.path} {self.how}{at}"

    @property
    def in_cache(self) -> bool:
        return self.path.split("/")[0] == "cache"

    def spoils(self, golden: Path) -> bool:
        """Return whether a file still exists with other content; missing files are
        recreated."""
        return self.how != "removed" and (golden / self.path).is_file()

    def apply(self, root: Path) -> None:
        target = root / self.path
        match self.how:
            case "removed":
                shutil.rmtree(target) if target.is_dir() else target.unlink()
            case "emptied" if target.is_dir():
                shutil.rmtree(target)
                target.mkdir()
            case "emptied":
                target.write_bytes(b"")
            case "halved":
                data = target.read_bytes()
                target.write_bytes(data[: len(data) // 2])
            case "flipped":
                data = bytearray(target.read_bytes())
                data[self.at[0]] ^= 1 << self.at[1]
                target.write_bytes(bytes(data))

    def undo(self, root: Path, golden: Path) -> None:
        """Restore the original, as an operator does from a backup."""
        target, original = root / self.path, golden / self.path
        if original.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(original, target)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(original, target)


def tree(root: Path) -> list[Path]:
    """List every file and folder below the data and cache folders, relative and sorted."""
    return sorted(
        path.relative_to(root) for top in ("data", "cache") for path in (root / top).rglob("*")
    )


def damages(golden: Golden, count: int, rng: random.Random) -> list[Damage]:
    """Return ``count`` damages, spread as evenly as possible over files and kinds.

    First comes every kind of damage on every file once, in random order; then more flips."""
    every: list[Damage] = []
    files: list[tuple[str, Path]] = []
    for kind, root in golden.folders.items():
        # The data folder itself is not removed, since that would look like a first start.
        for path in [Path("cache"), *tree(root)]:
            if (root / path).is_dir():
                every += [Damage(kind, str(path), how) for how in ("removed", "emptied")]
                continue
            files.append((kind, path))
            whole = (
                ["removed"]
                if not (root / path).stat().st_size
                else [
                    "removed",
                    "emptied",
                    "halved",
                ]
            )
            every += [Damage(kind, str(path), how) for how in whole]
    flips = [
        (kind, path) for kind, path in files if (golden.folders[kind] / path).stat().st_size
    ]
    every += [flip(golden, *each, rng) for each in flips]
    rng.shuffle(every)
    while len(every) < count:
        every.append(flip(golden, *rng.choice(flips), rng))
    return every[:count]


def flip(golden: Golden, kind: str, path: Path, rng: random.Random) -> Damage:
    """Make a flip of a random bit of a file."""
    size = (golden.folders[kind] / path).stat().st_size
    return Damage(kind, str(path), "flipped", (rng.randrange(size), rng.randrange(8)))


def make_golden(worker: Worker, work: Path, adapters: dict[str, Path]) -> Golden:
    """Push the adapters, request an answer from each, and keep both folders.

    Raises:
        AssertionError: the undamaged server does not serve all adapters.
    """
    stopped, killed = work / "stopped", work / "killed"
    stopped.mkdir(parents=True)
    first = worker.start(
        stopped,
        push={name: str(folder) for name, folder in adapters.items()},
        snapshot=str(killed),
    )
    assert set(first.get("pushed", {}).values()) == {"pushed"}, first
    answers = first["answers"]
    assert all(isinstance(tokens, list) for tokens in answers.values()), answers
    distinct = {tuple(tokens) for tokens in answers.values()}
    assert len(distinct) == 1 + len(set(ADAPTERS.values())), "adapters answer alike"
    golden = Golden({"stopped": stopped, "killed": killed}, answers, adapters)
    # The second start reads the first one's files.
    for root in golden.folders.values():
        copy = work / "check"
        shutil.copytree(root, copy)
        again = worker.start(copy)
        assert again.get("answers") == answers, again
        assert not again["log"], again["log"]
        shutil.rmtree(copy)
    return golden


def _contents(root: Path) -> dict[str, str]:
    """Return SHA-256 -> path of every adapter file below the data folder."""
    found = {}
    for path in (root / "data").rglob("*"):
        if path.is_file() and path.name in ("adapter_model.safetensors", "adapter_config.json"):
            found[hashlib.sha256(path.read_bytes()).hexdigest()] = str(path.relative_to(root))
    return found


@dataclass(slots=True)
class Judge:
    """Applies damages, and records failures.

    Attributes:
        outcomes: counts of outcomes of the first starts.
        failures: one line per failure, with the damage.
    """

    worker: Worker
    golden: Golden
    work: Path
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def run(self, number: int, damage: Damage) -> None:
        """Apply one damage: two starts on it, then the fix and a third start."""
        root = self.work / f"case-{number}"
        shutil.copytree(self.golden.folders[damage.golden], root)
        try:
            damage.apply(root)
            before = _contents(root)
            first = self.worker.start(root)
            second = self.worker.start(root)
            wrong = [
                *self._wrong("first start", damage, first),
                *self._wrong("second start", damage, second),
                *(f"{before[lost]} was deleted" for lost in before.keys() - _contents(root)),
            ]
            outcome = self._outcome(first)
            self.outcomes[outcome] += 1
            self.told.append(f"{damage}: {outcome}: {self._said(first)}")
            if damage.in_cache:
                wrong += self._cache(damage, first, second)
            elif not wrong:
                wrong += self._way_out(damage, root, number, first, second)
            self.failures += [f"{damage}: {each}" for each in wrong]
        finally:
            shutil.rmtree(root, ignore_errors=True)

    def _outcome(self, seen: Answers) -> str:
        if "refused" in seen:
            return "start refused"
        if "answers" not in seen:
            return "crash"
        lost = sum(
            tokens != self.golden.answers[name] for name, tokens in seen["answers"].items()
        )
        return "adapters refused" if lost else ("served, said so" if seen["log"] else "served")

    def _said(self, seen: Answers) -> str:
        if "refused" in seen:
            return str(seen["refused"]["message"])
        refused = [
            a["message"] for a in seen.get("answers", {}).values() if isinstance(a, dict)
        ]
        return " | ".join([*seen.get("log", []), *refused][:3])

    def _wrong(self, when: str, damage: Damage, seen: Answers) -> Iterator[str]:
        if "died" in seen or "crashed" in seen:
            yield f"{when}: {seen.get('died') or seen['crashed'][-1500:]}"
            return
        if "refused" in seen:
            yield from (f"{when}: {each}" for each in _bad_sentence(seen["refused"]))
            return
        for line in seen["log"]:
            if "Traceback" in line or "a listener failed" in line:
                yield f"{when}: logged {line[:300]}"
        for name, got in seen["answers"].items():
            right = self.golden.answers[name]
            if isinstance(got, list):
                if got != right:
                    yield f"{when}: {name or 'the base'} answers {got}, not {right}"
            elif damage.in_cache:
                yield f"{when}: {name or 'the base'} refused: {got}"
            elif got["code"] not in REFUSED:
                yield f"{when}: {name or 'the base'} refused with {got}"
            else:
                yield from (f"{when}: {name}: {each}" for each in _bad_sentence(got))

    def _cache(self, damage: Damage, first: Answers, second: Answers) -> Iterator[str]:
        if "refused" in first:
            yield f"a damaged cache stops the server: {first['refused']['message']}"
        elif not first.get("log") and damage.spoils(self.golden.folders[damage.golden]):
            yield "nothing was said of the damaged cache"
        if second.get("log"):
            yield f"the second start still has to say: {second['log'][:2]}"

    def _way_out(
        self, damage: Damage, root: Path, number: int, first: Answers, second: Answers
    ) -> Iterator[str]:
        """Either restore the file or do what the message says, alternately."""
        if "refused" in first:
            message = second.get("refused", first["refused"])["message"]
            if RECOVER in message and number % 2:
                done = subprocess.run(
                    [
                        str(Path(sys.executable).with_name("veneer-server")),
                        "store",
                        "recover",
                        "--data-dir",
                        str(root / "data"),
                    ],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    yield f"store recover failed: {done.stderr.strip()[-500:]}"
                    return
                yield from self._after("store recover", root, {})
                return
            damage.undo(root, self.golden.folders[damage.golden])
            yield from self._after("put back", root, {})
            return
        lost = [n for n, got in second["answers"].items() if got != self.golden.answers[n]]
        push = {name: str(self.golden.adapters[name]) for name in lost}
        yield from self._after("pushed again", root, push)

    def _after(self, what: str, root: Path, push: dict[str, str]) -> Iterator[str]:
        seen = self.worker.start(root, push=push)
        if seen.get("answers") != self.golden.answers:
            said = {k: v for k, v in seen.items() if v and v != self.golden.answers}
            yield f"after {what}: {said!r:.800}"


def _bad_sentence(said: dict[str, Any]) -> Iterator[str]:
    """Yield reasons why an operator could not use a refusal."""
    message = said["message"]
    if said["code"] in ("INTERNAL", "UNKNOWN") or "Traceback" in message:
        yield f"refused with {said['code']}: {message[:300]}"
    if not 20 <= len(message) <= LONGEST_MESSAGE or "\n" in message:
        yield f"not one sentence: {message[:300]!r}"
