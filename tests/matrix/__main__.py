"""Run the suite under other conditions: ``python -m tests.matrix`` (``make test-matrix``).

``--list`` lists the conditions, ``--only NAME`` runs one (repeatable). ``--quick`` runs CI's
part of the suite under the cheap conditions, ``--numeric`` runs the tests that compare numbers
under other instruction sets and numbers of threads. Arguments after ``--`` go to pytest, such
as test files. Each run's output is in ``.cache/matrix/NAME.log``. The exit status is 1 if a
condition fails or cannot be run here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

from tests import summary
from tests.matrix.conditions import CONDITIONS, Condition, Unavailable, joined
from tests.places import REPOSITORY, cache_dir

LOGS = REPOSITORY / ".cache" / "matrix"
QUICK = (
    ("locale-turkish", "umask-000", "read-only-home"),
    ("locale-latin1", "umask-077", "threads-4"),
)
"""Conditions that do not interact run together, and each covers something different. ``user``
is part of ``read-only-home``, and kernels are tested with both instruction sets anyway."""
QUICK_TESTS = (
    "tests/integration/test_restart.py",
    "tests/unit/server/engine/test_backends.py",
    "tests/unit/server/machine",
    "tests/unit/registry/test_catalog_and_store.py",
    "tests/unit/registry/test_registry_facade.py",
    "tests/unit/server/config",
    "tests/unit/server/text",
    "tests/unit/client/test_cli.py",
    "tests/unit/client/test_local.py",
    "tests/unit/train/test_train_config.py",
)
"""Tests that read and write files, parse text and start servers. Slow tests come first, so that
no worker is left alone with them at the end."""

QUICK_LEFT_OUT = (
    "--deselect=tests/unit/server/engine/test_backends.py"
    "::test_prebuilt_kernels_serve_under_a_name_that_says_so",
)
"""This test compiles for a minute, and its result does not depend on the condition."""

NUMERIC = (
    "plain",
    "avx512-vnni",
    "avx512",
    "avx2-vnni",
    "avx2",
    "torch",
    "torch-avx512",
    "torch-avx2",
    "torch-oldest",
    "threads-1",
    "threads-4",
)
NUMERIC_TESTS = (
    "tests/integration/test_llama_cpp.py",
    "tests/integration/test_openai.py",
    "tests/integration/test_parity.py",
    "tests/integration/test_same_result.py",
    "tests/integration/test_sampling.py",
    "tests/integration/test_self_test.py",
    "tests/integration/test_serving.py",
    "tests/integration/test_trainer_and_server.py",
    "tests/unit/server/native",
    "tests/unit/server/engine/test_non_finite.py",
    "tests/unit/server/engine/test_sampler.py",
    "tests/unit/server/rpc/test_self_test.py",
    "tests/unit/server/test_decoder.py",
    "tests/unit/server/test_reference.py",
    "tests/unit/train/test_train_after.py",
    "tests/unit/train/test_train_batches.py",
    "tests/unit/train/test_train_checkpoints.py",
    "tests/unit/train/test_train_guard.py",
    "tests/unit/train/test_train_labs.py",
    "tests/unit/train/test_train_merge.py",
    "tests/unit/train/test_train_quant.py",
    "tests/unit/train/test_train_run.py",
    "tests/unit/train/test_train_stability.py",
)
"""docs/numeric-tests.md lists what each test compares, and with what tolerance."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of a run.

    Attributes:
        said: text for the table.
        failed: tests that failed or could not be run.
    """

    name: str
    said: str
    failed: tuple[str, ...]
    seconds: float


def run(condition: Condition, chosen: list[str]) -> Result:
    """Run the suite, or the ``chosen`` tests, under one condition."""
    began = time.monotonic()
    scratch = LOGS / condition.name
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    # Users other than root need access to the content.
    scratch.chmod(0o755)
    try:
        prepared = condition.prepare(scratch)
    except Unavailable as reason:
        return Result(condition.name, f"CANNOT RUN: {reason}", (str(reason),), 0.0)
    report = Path(prepared.environment.get("TMPDIR", str(scratch))) / "report.xml"
    command = [*prepared.prefix, sys.executable, "-m", "tests.rerun", f"--junitxml={report}"]
    command += ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder", *chosen]
    environment = {
        "VENEER_CACHE_DIR": str(cache_dir()),
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
        **prepared.environment,
    }
    with (LOGS / f"{condition.name}.log").open("w") as log:
        status = subprocess.run(
            command, cwd=REPOSITORY, env=environment, stdout=log, stderr=log, check=False
        ).returncode
    said, failed = _read(report, status)
    shutil.rmtree(scratch, ignore_errors=True)
    return Result(condition.name, said, failed, time.monotonic() - began)


def _read(report: Path, status: int) -> tuple[str, tuple[str, ...]]:
    """Return the counts and failures of a run, from its report."""
    if not report.exists():
        return f"DID NOT RUN: pytest ended with {status}", ("pytest",)
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    count, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = tuple(
        f"{case.attrib['classname']}::{case.attrib['name']}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    )
    passed = count - skipped - len(failed)
    if not status:  # run again, they passed
        said = f", {len(failed)} only alone" if failed else ""
        return f"passed: {passed} passed{said}, {skipped} skipped", ()
    said = f"FAILED: {passed} passed, {len(failed)} failed, {skipped} skipped"
    return said, failed or (f"pytest ended with {status}",)


def main() -> int:
    """Run the conditions that the command line names; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="tests.matrix",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [condition.name for condition in CONDITIONS]
    parser.add_argument("--list", action="store_true", help="name the conditions")
    parser.add_argument("--only", action="append", choices=names, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="what CI runs: a part of each")
    parser.add_argument("--numeric", action="store_true", help="tests that compare numbers")
    parser.add_argument("tests", nargs="*", help="for pytest; the whole suite without")
    given = parser.parse_args()
    if given.list:
        for condition in CONDITIONS:
            print(f"{condition.name:16} {condition.what}")
        return 0
    known = {condition.name: condition for condition in CONDITIONS}
    wanted, chosen = [(name,) for name in names], ["--whole"]
    if given.quick:
        wanted, chosen = list(QUICK), [*QUICK_TESTS, *QUICK_LEFT_OUT]
    elif given.numeric:
        wanted, chosen = [(name,) for name in NUMERIC], list(NUMERIC_TESTS)
    if given.only:
        wanted = [(name,) for name in names if name in given.only]
    results = []
    for together in wanted:
        condition = joined([known[name] for name in together])
        result = run(condition, given.tests or chosen)
        results.append(result)
        print(f"{result.name:32} | {result.said} | {result.seconds:.0f} s", flush=True)
        for line in result.failed[:20]:
            print(f"    {line}", flush=True)
        if result.failed:
            summary.add(f"FAILED condition {result.name}: {result.said}")
    bad = [result.name for result in results if result.failed]
    print(f"{len(results)} conditions, failed: {', '.join(bad) or 'none'} (logs: {LOGS})")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
