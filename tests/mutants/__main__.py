"""Do the tests notice wrong kernels? ``python -m tests.mutants`` (``make mutants``).

Each mutant (`tests.mutants.native`) is a copy of the server's package with one replacement. The
product compiles it as usual, and it must fail the kernels' tests. A table says which test
noticed. First comes a control without a mutation, which must pass. Exits 1 if a mutant
survives, does not compile, or no longer fits its file.

Not in CI: it takes about 10 core-seconds per mutant. A unit test checks that every mutant still
fits its file.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import veneer_server

from tests.mutants.native import MUTANTS, Form, Mutant

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = Path(veneer_server.__file__).parent
TESTS = ("tests/unit/server/native", "tests/unit/server/engine/test_sampler.py")
SLOW = "put_aside"
"""Tests to leave out: they recompile the kernels, and concern threads."""
_NONE = Mutant("(none)", "", "", "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """Result of a mutant.

    Attributes:
        killed_by: the first test that failed, or "".
        problem: why the result is not valid, or "".
    """

    mutant: Mutant
    killed_by: str
    problem: str
    seconds: float


def judge(mutant: Mutant) -> Verdict:
    """Compile a mutant and run the tests until one fails."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="veneer-mutant-") as scratch:
        package = Path(scratch) / "path" / "veneer_server"
        shutil.copytree(PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
        if mutant.file:
            mutant.apply(package / "backends" / "native")
        passed, told = _run(package, mutant.form, Path(scratch) / "tests")
    killed = re.search(r"^FAILED \S*::(\S+)", told, re.MULTILINE)
    # No server would load such a library.
    killed = killed or re.search(
        r"do not run here: (a GEMM of kind \d[\w -]* has a wrong result)", told
    )
    problem = ""
    if f"uses {package}" not in told:
        problem = f"the tests did not run with it: {told[-500:]}"
    elif not passed and killed is None:
        problem = f"it cannot be tested: {told[-1500:]}"
    return Verdict(mutant, killed[1] if killed else "", problem, time.monotonic() - began)


def _run(package: Path, form: Form, scratch: Path) -> tuple[bool, str]:
    """Whether the tests of one instruction set pass with a package, and their output."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(package.parent), str(REPOSITORY))),
        "PYTHONDONTWRITEBYTECODE": "1",
        "CXX": str(Path(__file__).with_name("c++")),
        "OMP_WAIT_POLICY": "passive",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-x",
            "-p",
            "tests.mutants.shown",
            *("--basetemp", str(scratch), "-k", f"{form} and not {SLOW}", *TESTS),
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.stdout + done.stderr


def main() -> int:
    """Judge the mutants of the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants whose name or file has this in it")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if given.only in m.name or given.only in m.file]
    began = time.monotonic()
    for form in sorted({mutant.form for mutant in chosen}):
        control = judge(replace(_NONE, form=form))
        if control.killed_by or control.problem:
            print(f"the kernels as they are fail: {control.killed_by}{control.problem}")
            return 1
    wrong = 0
    with ThreadPoolExecutor(given.jobs) as pool:
        for verdict in pool.map(judge, chosen):
            said = verdict.problem or verdict.killed_by or "NOBODY: it survives"
            wrong += not verdict.killed_by
            mutant = verdict.mutant
            print(
                f"{mutant.file:16} | {mutant.name:48} | {said} | {verdict.seconds:.0f} s",
                flush=True,
            )
    print(f"{len(chosen) - wrong} of {len(chosen)} killed in {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
