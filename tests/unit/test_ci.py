"""The gate itself: what CI makes of stages and tests that fail, hang, or fail by chance."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import rerun
from tests.places import REPOSITORY
from tests.rerun import Outcome, Run

# ------------------------------------------------------------- stages

_STAGES = """
import sys
from pathlib import Path
from tests.ci import Stage, Stages, report
results = Stages(Path(sys.argv[1]), float(sys.argv[2])).run(eval(sys.argv[3]))
print(*report(results), sep="\\n")
"""


def run_stages(folder: Path, stages: str, limit_s: float = 1000) -> list[str]:
    """Run them in a process of their own, which kills everything below it."""
    ended = subprocess.run(
        [sys.executable, "-c", _STAGES, str(folder), str(limit_s), f"({stages},)"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return ended.stdout.splitlines()


def test_a_failed_stage_hides_no_later_one_and_all_failures_are_listed_last(
    tmp_path: Path,
) -> None:
    lines = run_stages(
        tmp_path,
        "Stage('one', 'echo why; exit 3', 60), Stage('two', 'echo FAILED x >> "
        "$VENEER_CI_SUMMARY; exit 1', 60), Stage('three', 'true', 60)",
    )
    assert [line.split()[1:5:3] for line in lines[-4:-1]] == [
        ["one", "FAILED"],
        ["two", "FAILED"],
        ["three", "passed"],
    ]
    assert lines[-1].endswith("failed: one, two, left out: none")
    closing = lines[lines.index("== one:") :]
    assert "    why" in closing
    assert "    FAILED x" in closing


def test_nothing_of_a_stage_is_left_for_the_next(tmp_path: Path) -> None:
    """Not even a process whose parent has ended, in a session of its own."""
    file = tmp_path / "daemon"
    leaves = f"(setsid sh -c 'echo $$ > {file}; exec sleep 1000' & exit); "
    leaves += f"until test -s {file}; do sleep 0.05; done"
    lines = run_stages(
        tmp_path,
        "Stage('hangs', 'sleep 1000', 0.2), "
        f'Stage("leaves", "{leaves}", 60), '
        f"Stage('next', '! kill -0 $(cat {file})', 60)",
    )
    assert "did not end" in lines[-4]
    assert lines[-1].endswith("failed: hangs, left out: none")


def test_downloads_are_tried_again_and_nothing_runs_without_what_is_needed(
    tmp_path: Path,
) -> None:
    once = f"test -e {tmp_path}/tried || {{ touch {tmp_path}/tried; exit 1; }}"
    lines = run_stages(
        tmp_path,
        f"Stage('fetch', '{once}', 60, tries=2), "
        "Stage('install', 'exit 1', 60, needed=True), Stage('later', 'true', 60)",
    )
    assert lines[-1].endswith("failed: install, left out: later")


def test_only_what_is_optional_may_be_left_out(tmp_path: Path) -> None:
    lines = run_stages(
        tmp_path,
        "Stage('must', 'true', 60), Stage('may', 'true', 60, optional=True)",
        limit_s=1,
    )
    assert lines[-1].endswith("failed: must, left out: may")


# ------------------------------------------------------------- failed tests, run again


@pytest.fixture
def verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Judge a first run in which tests failed, by runs that are FAKE: each is the tests that
    fail in it. Returns the exit status, what was printed, and CI's summary."""

    def outcome(test: str, *, failed: bool, fixture: bool = False) -> Outcome:
        text = "broken" if failed else ""
        return Outcome(test, failed, fixture, text, "output of the " + text + " run")

    def judge(
        failed: list[str], *reruns: list[str], fixture: bool = False
    ) -> tuple[int, str, str]:
        left = list(reruns)

        def run(names: list[str]) -> Run:
            red = left.pop(0)
            ended = {name: outcome(name, failed=name in red) for name in names}
            return Run(int(bool(red)), ended)

        monkeypatch.setattr(rerun, "run", run)
        monkeypatch.setattr(rerun, "busy", contextlib.nullcontext)
        monkeypatch.setenv("VENEER_CI_SUMMARY", str(tmp_path / "summary"))
        first = Run(1, {name: outcome(name, failed=True, fixture=fixture) for name in failed})
        status = rerun.again(first)
        assert left == []
        return status, capsys.readouterr().out, (tmp_path / "summary").read_text()

    return judge


def test_a_test_that_passes_alone_and_beside_load_failed_by_chance(verdict: Any) -> None:
    status, printed, summary = verdict(["f::a"], [], [], ["f::a"], [])
    assert status == 0
    shown = printed.partition("PASSED ONLY ALONE: f::a, seed ")[2]
    assert shown.index("output of the broken run") < shown.index("output of the  run")
    assert "PASSED ONLY ALONE f::a" in summary


def test_a_race_that_shows_twice_beside_load_is_no_chance(verdict: Any) -> None:
    status, _, summary = verdict(["f::a", "f::b"], [], ["f::a"], [], ["f::a"])
    assert status == 1
    assert "FAILED f::a (in 2 of 3 runs" in summary
    assert "PASSED ONLY ALONE f::b" in summary


def test_more_than_three_that_passed_only_alone_fail(verdict: Any) -> None:
    names = [f"f::{name}" for name in "abcd"]
    assert verdict(names, [])[0] == 1
    assert verdict(names[:3], [], [], [], [])[0] == 0
    # The same error of a fixture that they share is one.
    assert verdict(names, [], [], [], [], fixture=True)[0] == 0


def test_what_failed_twice_is_listed_beside_what_did_not(verdict: Any) -> None:
    status, _, summary = verdict(["f::a", "f::b"], ["f::a"])
    assert status == 1
    assert "FAILED f::a (again, alone)" in summary
    assert "PASSED ONLY ALONE f::b" in summary


@pytest.mark.parametrize(
    ("text", "status", "shown"),
    [
        pytest.param(
            "def test_a(): assert False", 1, "FAILED test_planted.py::test_a", id="bug"
        ),
        pytest.param(
            "import os, pathlib\n"
            "def test_a():\n"
            "    if pathlib.Path('again').exists(): os.abort()\n"
            "    pathlib.Path('again').touch()\n"
            "    assert False",
            1,
            "FAILED test_planted.py::test_a (again, alone)",
            id="a crash, alone",
        ),
        pytest.param("import nothing_of_that_name", 2, "", id="no test ran"),
    ],
)
def test_real_runs(tmp_path: Path, text: str, status: int, shown: str) -> None:
    (tmp_path / "test_planted.py").write_text(text)
    (tmp_path / "summary").touch()
    ended = subprocess.run(
        [sys.executable, "-m", "tests.rerun", "-q", "test_planted.py"],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(REPOSITORY), "VENEER_CI_SUMMARY": str(tmp_path / "summary")},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == status, ended.stdout
    assert shown in (tmp_path / "summary").read_text()
