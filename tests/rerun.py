"""Run pytest, and its failed tests once more: ``python -m tests.rerun PYTEST_ARGUMENTS``.

A test that fails beside others and passes alone has met a busy machine, or a bug that shows
only sometimes. To tell these apart, the failed tests run again:

1. Alone: in one process, nothing beside it, with the same seed. A test that fails again has
   failed.
2. A test that passes alone runs three times beside a process on each core that computes without
   pause. If it fails in two of these, it has failed: that is no chance.
3. What is left is printed as PASSED ONLY ALONE, with the seed and the output of both runs, and
   does not fail the run unless there are more than three. Errors of one file with the same text
   in a fixture that they share count once. CONTRIBUTING.md says what to do about such a test.

The exit status is that of pytest, and 0 if every test that failed is of kind 3. Tests are not
run again if more than twenty failed, or if pytest ended for another reason than a failed test.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests import seeds, summary

MOST_FAILED: Final = 20
"""Failed tests that are run again. More than that have a common cause."""
MOST_ONLY_ALONE: Final = 3
REPEATS: Final = 3
RED_REPEATS: Final = 2
"""Of `REPEATS`, how often a test fails that has not failed by chance."""
_OPTION: Final = "--outcomes"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one test ended.

    Attributes:
        test: its node id.
        failed: whether it failed or had an error, in whichever phase.
        fixture: whether it was an error in a fixture, before the test began.
        text: pytest's report of the failure; "" for a test that passed.
        output: what the test printed and logged.
    """

    test: str
    failed: bool
    fixture: bool
    text: str
    output: str


@dataclass(frozen=True, slots=True)
class Run:
    """A run of pytest: its exit status, and the tests' outcomes by node id."""

    status: int
    outcomes: Mapping[str, Outcome]

    def failed(self) -> list[Outcome]:
        return [each for each in self.outcomes.values() if each.failed]

    def passed(self, test: str) -> bool:
        """Return whether the test ran to its end and passed."""
        return test in self.outcomes and not self.outcomes[test].failed


# ------------------------------------------------------------- the plugin: ``-p tests.rerun``


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(_OPTION, type=Path, help="write how each test ended to this file")


def pytest_configure(config: pytest.Config) -> None:
    file: Path | None = config.getoption(_OPTION)
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Writer(file))


class _Writer:
    """Writes a line of JSON for each failed phase of a test, and for each test's call."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed and report.when != "call":
            return
        outcome = {
            "test": report.nodeid,
            "failed": report.failed,
            "fixture": report.when == "setup",
            "text": report.longreprtext if report.failed else "",
            "output": "\n".join(f"--- {name}\n{text}" for name, text in report.sections),
        }
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(outcome) + "\n")


def read(file: Path) -> dict[str, Outcome]:
    """Read what `_Writer` wrote; of a test that failed, its first failure."""
    found: dict[str, Outcome] = {}
    for line in file.read_text("utf-8").splitlines() if file.exists() else ():
        outcome = Outcome(**json.loads(line))
        known = found.get(outcome.test)
        if known is None or (outcome.failed and not known.failed):
            found[outcome.test] = outcome
    return found


# ------------------------------------------------------------- the runs


def run(arguments: Sequence[str]) -> Run:
    """Run pytest in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-p", "tests.rerun", f"{_OPTION}={file}"]
        status = subprocess.run([*command, *arguments], check=False).returncode
        return Run(status, read(file))


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """A process on each core that computes without pause."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def causes(failed: Sequence[Outcome]) -> int:
    """Count the failures; the same error of the same file's fixture counts once."""
    return len(
        {
            (each.test.partition("::")[0], each.text) if each.fixture else (each.test, "")
            for each in failed
        }
    )


def again(first: Run) -> int:
    """Run the failed tests again, print the verdict on each, return the exit status."""
    failed = first.failed()
    if len(failed) > MOST_FAILED:
        print(f"{len(failed)} tests failed, too many to run them again")
        for each in failed[:MOST_FAILED]:
            summary.add(f"FAILED {each.test}")
        summary.add(f"and {len(failed) - MOST_FAILED} more")
        return 1
    names = [each.test for each in failed]
    print(f"== {len(names)} failed; running them again, alone", flush=True)
    alone = run(names)
    red = {test: "again, alone" for test in names if not alone.passed(test)}
    chance = [each for each in failed if each.test not in red]
    if chance and not red and causes(chance) <= MOST_ONLY_ALONE:
        red |= _red_beside_load([each.test for each in chance])
        chance = [each for each in failed if each.test not in red]
    for test, when in red.items():
        summary.add(f"FAILED {test} ({when})")
    for each in chance:
        summary.add(f"PASSED ONLY ALONE {each.test} (seed {seeds.seed()})")
        print(f"\n== PASSED ONLY ALONE: {each.test}, seed {seeds.seed()}")
        print(f"-- beside the others:\n{each.text}\n{each.output}")
        print(f"-- alone:\n{alone.outcomes[each.test].output or '(no output)'}", flush=True)
    passed = sum(not each.failed for each in first.outcomes.values())
    print(f"\nin all: {passed} passed, {len(chance)} only alone, {len(red)} failed", flush=True)
    if causes(chance) > MOST_ONLY_ALONE:
        summary.add(f"FAILED: more than {MOST_ONLY_ALONE} tests passed only alone")
    return int(bool(red) or causes(chance) > MOST_ONLY_ALONE)


def _red_beside_load(tests: list[str]) -> dict[str, str]:
    """Of tests that passed alone, those that fail beside busy processes, and how often."""
    print(f"== passed alone; running them {REPEATS} times on a busy machine", flush=True)
    with busy():
        runs = [run(tests) for _ in range(REPEATS)]
    count = {test: sum(not each.passed(test) for each in runs) for test in tests}
    return {
        test: f"in {times} of {REPEATS} runs on a busy machine"
        for test, times in count.items()
        if times >= RED_REPEATS
    }


def main(arguments: Sequence[str]) -> int:
    # Both runs draw the same inputs.
    os.environ[seeds.VARIABLE] = str(seeds.seed())
    first = run(arguments)
    if first.status != pytest.ExitCode.TESTS_FAILED or not first.failed():
        return first.status
    return again(first)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
