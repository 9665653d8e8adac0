"""Everything that a push must prove, from nothing: ``.ci/run`` runs ``python3 -m tests.ci``.

Runs `STAGES` in order with a hard limit each. A stage that fails does not keep the later ones
from running. The last lines say how each stage ended, every test that failed or passed only
when it was repeated (`tests.rerun`), and what was left out for lack of time. The exit status is
1 if a stage failed. Output is also in ``.cache/ci/STAGE.log``.

Random inputs come from the hash of the tree (`tests.seeds`), and pip installs the versions of
``.ci/constraints.txt``. This needs nothing but Python's standard library.
"""

from __future__ import annotations

import ctypes
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from tests import seeds, summary

ROOT: Final = Path(__file__).resolve().parents[1]
LIMIT_S: Final = 5100
"""For all stages. A push is not judged if it takes longer than an hour and a half."""
_LEAST_S: Final = 120
"""A stage does not start with less time than this."""
_TAIL: Final = 40
"""Lines of output to repeat of a stage that failed and listed no failures itself."""
_PR_SET_CHILD_SUBREAPER: Final = 36


@dataclass(frozen=True, slots=True)
class Stage:
    """A command and what is made of its end.

    Attributes:
        command: for bash, in the repository's root.
        limit_s: seconds after which it has failed.
        optional: whether a push may land without it if there was no time left for it.
        tries: how often it may run until it passes; above 1 for what downloads.
        needed: whether no later stage can run if it fails.
    """

    name: str
    command: str
    limit_s: float
    optional: bool = False
    tries: int = 1
    needed: bool = False


# Limits are three times what an idle Xeon takes. Tools are mostly downloads, so the checks run
# beside them.
STAGES: Final = (
    Stage("install", "make install packages", 900, tries=2, needed=True),
    Stage(
        "check", "make --jobs=4 --output-sync=target --keep-going tools check", 1200, tries=2
    ),
    Stage("test", "make test", 1500),
    Stage("push", "make test-push", 2400),
    Stage("attacks", "make attacks-quick", 1200, optional=True),
    Stage("torture", "make torture-quick", 900, optional=True),
    # What takes long and depends on few files runs if they have changed since it last passed.
    Stage(
        "changed",
        ".venv/bin/python -m tests.verify --changed"
        " native cuda training loadtest sanitize wheel image",
        2400,
        optional=True,
    ),
    Stage("matrix", "make test-matrix-quick", 900, optional=True),
)


@dataclass(frozen=True, slots=True)
class Result:
    """How a stage ended.

    Attributes:
        verdict: "passed", "FAILED" or "LEFT OUT", and why.
        lines: what its programs added to the summary.
    """

    stage: Stage
    verdict: str
    seconds: float
    lines: Sequence[str] = ()

    @property
    def failed(self) -> bool:
        return self.verdict.startswith("FAILED")


class Stages:
    """Runs stages one after the other, none longer than its limit, all within another.

    Whatever a stage leaves running is killed before the next one starts, also if it has left
    the stage's process group.
    """

    def __init__(self, logs: Path, limit_s: float = LIMIT_S) -> None:
        self._logs = logs
        self._end = time.monotonic() + limit_s
        # Processes whose parent has ended become children of this one: `_kill_all` finds them.
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def run(self, stages: Sequence[Stage]) -> list[Result]:
        results: list[Result] = []
        missing = ""
        for stage in stages:
            if missing:
                result = Result(stage, f"LEFT OUT: {missing} failed", 0.0)
            else:
                result = self._run(stage)
            results.append(result)
            print(f"== {stage.name}: {result.verdict}, {result.seconds:.0f} s", flush=True)
            if stage.needed and result.verdict != "passed":
                missing = stage.name
        return results

    def _run(self, stage: Stage) -> Result:
        began = time.monotonic()
        log, lines = (self._logs / f"{stage.name}.{end}" for end in ("log", "summary"))
        log.write_bytes(b"")
        lines.unlink(missing_ok=True)
        verdict = ""
        for tried in range(stage.tries):
            left = self._end - time.monotonic()
            if left < _LEAST_S:
                break
            if tried:
                print(f"== {stage.name}: {verdict}; once more", flush=True)
                lines.unlink(missing_ok=True)
            verdict = self._run_once(stage, log, lines, left)
            if verdict == "passed":
                break
        if not verdict:
            verdict = "LEFT OUT: no time" if stage.optional else "FAILED: no time was left"
        said = lines.read_text("utf-8").splitlines() if lines.exists() else []
        if verdict.startswith("FAILED") and not any("FAILED" in line for line in said):
            said += _end_of(log)
        return Result(stage, verdict, time.monotonic() - began, said)

    def _run_once(self, stage: Stage, log: Path, lines: Path, left: float) -> str:
        limit = min(stage.limit_s, left)
        with log.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", stage.command],
                cwd=ROOT,
                env={**os.environ, summary.VARIABLE: str(lines)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            assert process.stdout is not None
            statuses: queue.SimpleQueue[int] = queue.SimpleQueue()
            copy = threading.Thread(target=_copy, args=(process.stdout, out))
            reaper = threading.Thread(target=_reap, args=(process.pid, statuses))
            copy.start()
            reaper.start()
            try:
                status = statuses.get(timeout=limit)
            except queue.Empty:
                status = None
            finally:
                while reaper.is_alive():
                    _kill_all()
                    reaper.join(0.05)
                copy.join()
                process.wait()
        if status is None and limit < stage.limit_s and stage.optional:
            return f"LEFT OUT: no time, ended after {limit:.0f} s"
        if status is None:
            return f"FAILED: did not end within {limit:.0f} s"
        return "passed" if status == 0 else f"FAILED ({status})"


def _copy(source: BinaryIO, log: BinaryIO) -> None:
    while chunk := os.read(source.fileno(), 1 << 16):
        log.write(chunk)
        sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()


def _reap(wanted: int, statuses: queue.SimpleQueue[int]) -> None:
    """Collect children at once, as init would, until there are none; put the status of one.

    Tests wait for processes to be gone, also for those whose parent has ended.
    """
    try:
        while True:
            process, status = os.waitpid(-1, 0)
            if process == wanted:
                statuses.put(os.waitstatus_to_exitcode(status))
    except ChildProcessError:
        return


def _kill_all() -> None:
    """Kill every process below this one."""
    for process in _below(os.getpid()):
        try:
            os.kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _below(process: int) -> Iterator[int]:
    for child in _children(process):
        yield from _below(child)
        yield child


def _children(process: int) -> Iterator[int]:
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            # Fields after the name, which may have blanks and brackets: state, parent.
            parent = int(file.read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError):  # it has just ended
            continue
        if parent == process:
            yield int(file.parent.name)


def _end_of(log: Path) -> list[str]:
    lines = log.read_text("utf-8", "replace").splitlines()
    return [
        *(line for line in lines[:-_TAIL] if re.match(r"make.*\*\*\*", line)),
        *lines[-_TAIL:],
    ]


def tree_seed() -> int:
    """The seed of CI's random inputs: of the tree's hash."""
    tree = subprocess.run(
        ["git", "rev-parse", "HEAD^{tree}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(tree.stdout[:7], 16)


def report(results: Sequence[Result]) -> Iterator[str]:
    """The last lines: failures by stage, then each stage, what failed and what was left out."""
    for each in results:
        if each.lines:
            yield f"\n== {each.stage.name}:"
            yield from (f"    {line}" for line in each.lines)
    yield ""
    for each in results:
        yield f"== {each.stage.name:8} {each.seconds:5.0f} s  {each.verdict}"
    failed = [each.stage.name for each in results if each.failed]
    left_out = [each.stage.name for each in results if each.verdict.startswith("LEFT OUT")]
    total = sum(each.seconds for each in results)
    yield (
        f"== all: {total:.0f} s, failed: {', '.join(failed) or 'none'}, "
        f"left out: {', '.join(left_out) or 'none'}"
    )


def main() -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["CI"] = "true"
    os.environ.setdefault(seeds.VARIABLE, str(tree_seed()))
    # Every program that a test starts would compile what it imports again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    logs = ROOT / ".cache" / "ci"
    shutil.rmtree(logs, ignore_errors=True)
    logs.mkdir(parents=True)
    print(f"== seed {os.environ[seeds.VARIABLE]}", flush=True)
    results = Stages(logs).run(STAGES)
    print(*report(results), sep="\n", flush=True)
    return int(any(each.failed for each in results))


if __name__ == "__main__":
    sys.exit(main())
