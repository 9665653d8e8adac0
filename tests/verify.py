"""Run everything there is and write down when: ``make verify``, or ``make verify ONLY=NAME``.

What ``make test`` and ``.ci/run`` leave out because it takes long is here as stages. Each stage
is a command; its output is in ``.cache/verify/NAME.log``, and its row in ``docs/verified.md``
says when it last ran, on which CPU and commit, how long it took and how it ended. A stage that
is run again replaces its row; the others stay. The page also lists the tests of each tier
(`tests.tiers`). ``--list`` prints the stages and writes the page without running anything.
``--changed NAME ...`` runs those of the named stages of which the subject (the files that
decide the result) has changed since the page's last passed run; ``.ci/run`` does that.
The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from tests import summary, tiers
from tests.bench.guard import cpu_name
from tests.places import REPOSITORY

PAGE: Final = REPOSITORY / "docs" / "verified.md"
LOGS: Final = REPOSITORY / ".cache" / "verify"
_NATIVE: Final = "server/veneer_server/backends/native"
_PYTEST: Final = "OMP_WAIT_POLICY=passive .venv/bin/python -m tests.rerun -n 3 --dist loadfile"
_ATTACKS: Final = "OMP_WAIT_POLICY=passive .venv/bin/python -m tests.attacks --full"


_TRAINING: Final = tuple(
    f"tests/integration/test_{name}.py"
    for name in ("train_and_swap", "trainer_and_server", "push_while_training", "llama_cpp")
)
_PAGES: Final = "tests/integration/test_report_page.py"
_ELSEWHERE: Final = (
    "tests/unit/server/native",
    "tests/unit/server/engine/test_backends.py",
    "tests/unit/server/cuda",
    "tests/unit/train",
    "tests/unit/loadtest",
    "tests/integration/test_programs.py",
    "tests/integration/test_agents.py",
    *_TRAINING,
    _PAGES,
)
"""Tests of the tier ``verify`` that have a stage of their own."""


def _tier(paths: str) -> str:
    return f"{_PYTEST} --tier verify --durations 10 {paths}"


@dataclass(frozen=True, slots=True)
class Stage:
    """One command and what it shows.

    Attributes:
        command: for a shell, in the repository's root.
        shows: what it means that the command succeeds.
        about: how long it takes on two cores.
        subject: the files and folders that decide the result, for ``--changed``; all of the
            repository if empty.
    """

    command: str
    shows: str
    about: str
    subject: tuple[str, ...] = ()

    def digest(self) -> str:
        """Eight hex digits over the subject's tracked files, as they are in the work tree."""
        listed = _git("ls-files", "-z", "--", *self.subject)
        total = hashlib.sha256()
        for name in sorted(filter(None, listed.split("\0"))):
            file = REPOSITORY / name
            content = file.read_bytes() if file.is_file() else b""
            total.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
        return total.hexdigest()[:8]


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout


STAGES: Final[Mapping[str, Stage]] = {
    "check": Stage("make check", "static checks of Python, C++ and the contract", "2 min"),
    "test": Stage("make test", "the tier of the suite that a person waits for", "8 min"),
    "push": Stage("make test-push", "the tier that every push must prove", "15 min"),
    "native": Stage(
        _tier("tests/unit/server/native tests/unit/server/engine/test_backends.py"),
        "kernels: each instruction set, ARM under QEMU, matrix registers, prebuilt libraries",
        "5 min",
        (
            _NATIVE,
            "tests/unit/server/native",
            "tests/arm",
            "tests/unit/server/engine/test_backends.py",
        ),
    ),
    "cuda": Stage(
        _tier("tests/unit/server/cuda"),
        "the CUDA backend on a simulated card, kernels within their budgets",
        "2 min",
        (
            "server/veneer_server/backends/cuda",
            "server/veneer_server/step",
            "tests/gpu",
            "tests/unit/server/cuda",
        ),
    ),
    "training": Stage(
        _tier(" ".join(("tests/unit/train", *_TRAINING))),
        "veneer-train: runs, resumes, exports, labs, judges of answers, from data to a swap",
        "5 min",
        (
            "training",
            "clients",
            "adapters_registry",
            "examples",
            "tests/unit/train",
            *_TRAINING,
        ),
    ),
    "loadtest": Stage(
        _tier(f"tests/unit/loadtest {_PAGES}"),
        "veneer-loadtest: figures, pages, peers, the simulator",
        "2 min",
        (
            "loadtest",
            "clients",
            "server/veneer_server/engine",
            "server/veneer_server/routing",
            "server/veneer_server/step",
            "tests/unit/loadtest",
            _PAGES,
        ),
    ),
    "controls": Stage(
        f"{_tier('tests')} " + " ".join(f"--ignore={folder}" for folder in _ELSEWHERE),
        "planted bugs that tests must notice, a pod that drains, int8 inputs",
        "5 min",
    ),
    "matrix": Stage(
        "make test-matrix",
        "the suite with other instruction sets, threads, locales, umasks and users",
        "hours",
    ),
    "numeric": Stage(
        "make test-numeric", "numeric tests with each instruction set, 1 and 4 threads", "1 h"
    ),
    "mutants": Stage(
        "make mutants",
        "the kernels' tests notice wrong kernels",
        "20 min",
        (_NATIVE, "tests/mutants"),
    ),
    "sanitize": Stage(
        "make sanitize",
        "kernels and decoder under ASan, UBSan, TSan",
        "2 min",
        (_NATIVE, "tests/sanitize"),
    ),
    "torture": Stage(
        "make torture",
        "every row of the reliability scoreboard in full, with its bugs",
        "hours",
    ),
    "scale": Stage(
        ".venv/bin/python -m tests.scale.two_registries && "
        ".venv/bin/python -m tests.scale.two_registries --bugs && "
        ".venv/bin/python -m tests.torture --row 25",
        "two registries and four engines keep their word under faults, and planted bugs show",
        "30 min",
        ("adapters_registry", "proto", "server/veneer_server", "tests/scale"),
    ),
    "attacks": Stage(
        f"{_ATTACKS} --times", "no attack harms a caller, gaps and memory bounded", "1 h"
    ),
    "attacks-busy": Stage(
        f"{_ATTACKS} --busy", "the same beside a process that computes", "1 h"
    ),
    "attacks-bugs": Stage("make attacks-bugs", "each attack notices its planted bug", "40 min"),
    "gpu-kernels": Stage(
        "make gpu-kernels", "every CUDA kernel in Triton's interpreter, then compiled", "20 min"
    ),
    "docs": Stage("make docs-check", "every command of the docs, slow ones too", "hours"),
    "programs": Stage(
        f"make programs && {_PYTEST} tests/integration/test_programs.py",
        "OpenAI clients that others wrote, unchanged",
        "5 min",
    ),
    "agents": Stage(
        f"make agents && {_PYTEST} tests/integration/test_agents.py",
        "coding agents that others wrote, newest versions, each through a tool call",
        "10 min",
    ),
    "ray": Stage("make ray && .venv/bin/python -m tests.ray", "Ray Serve", "10 min"),
    "wheel": Stage(
        "make wheel-check",
        "the wheel from nothing, without a compiler",
        "5 min",
        ("pyproject.toml", "hatch_build.py", "deploy/sbom.py", _NATIVE, "tests/packaging"),
    ),
    "image": Stage(
        "make image-replay",
        "the Dockerfile's steps, and its server asked",
        "6 min",
        ("Dockerfile", ".dockerignore", "pyproject.toml", "hatch_build.py", "tests/packaging"),
    ),
    "claims": Stage("make claims", "right answers as README and docs quote them", "1 h"),
    "bench-guard": Stage("make bench-guard", "native speed against this CPU's record", "5 min"),
}

_COUNTS: Final = re.compile(
    r"^=*\s*(?:in all: )?"
    r"((?:\d+ (?:passed|failed|skipped|errors?|only alone)(?:, )?)+)(?: in .*)?$"
)
"""pytest's last line, or that of `tests.rerun`."""
_SHOWN: Final = 80
"""Lines of output that are printed of a stage that failed."""
_RESULT, _DIGEST = 3, 7
"""Cells of a row, counted from what stands before the first bar."""
_HEAD: Final = """\
# When everything last ran

`make test` is what a person waits for, `.ci/run` what every push must prove. `make verify`
runs the rest before a release, stage by stage (`make verify ONLY=torture`), and writes this
page. Times are of two cores. *Subject* is a digest of the files that decide a stage's result:
`.ci/run` runs some stages only when it has changed since they last passed.

| stage | shows | last result | took | on | commit | subject | CPU |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""


def rows(page: str) -> dict[str, str]:
    """The table's rows by stage, as they stand in the page."""
    return {
        found[1]: found[0] for found in re.finditer(r"^\| `([\w-]+)` \|.*$", page, re.MULTILINE)
    }


def run(name: str, stage: Stage) -> tuple[bool, str]:
    """Run a stage; return whether it succeeded, and its row."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name}.log"
    print(
        f"{name}: {stage.command} (about {stage.about}; {log.relative_to(REPOSITORY)})",
        flush=True,
    )
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("wb") as out:
        ended = subprocess.run(
            ["bash", "-c", stage.command], cwd=REPOSITORY, stdout=out, stderr=subprocess.STDOUT
        )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    text = log.read_text("utf-8", "replace")
    counts = [found[1] for line in text.splitlines() if (found := _COUNTS.match(line.strip()))]
    result = "passed" if ended.returncode == 0 else f"FAILED ({ended.returncode})"
    if counts:
        result += f": {counts[-1]}"
    took = f"{(time.monotonic() - began) / 60:.1f} min ({cpu / 60:.1f} of CPU)"
    commit = _git("rev-parse", "--short=8", "HEAD").strip()
    day = datetime.date.today().isoformat()
    print(f"{name}: {result}, {took}", flush=True)
    if ended.returncode:
        print(*text.splitlines()[-_SHOWN:], sep="\n", flush=True)
        summary.add(f"FAILED stage {name}: {result}, {log.relative_to(REPOSITORY)}")
    cells = (f"`{name}`", stage.shows, result, took, day, commit, stage.digest(), cpu_name())
    return ended.returncode == 0, f"| {' | '.join(cells)} |"


def unchanged(name: str, known: Mapping[str, str]) -> bool:
    """Return whether the stage passed on the files that are here now, by the page."""
    cells = [cell.strip() for cell in known.get(name, "").split("|")]
    return (
        len(cells) > _DIGEST
        and cells[_RESULT].startswith("passed")
        and (cells[_DIGEST] == STAGES[name].digest())
    )


def page(known: Mapping[str, str]) -> str:
    """The page's text from the rows that are known."""

    def parts() -> Iterator[str]:
        yield _HEAD
        for name, stage in STAGES.items():
            never = f"| `{name}` | {stage.shows} | not run since this page exists | | | | | |"
            yield known.get(name, never) + "\n"
        for tier in tiers.MARKED:
            runs = "`.ci/run`, not in `make test`" if tier == "push" else "`make verify` alone"
            yield f"\n## Tests in {runs}\n\n"
            yield from (f"- `{name}`\n" for name in tiers.marked(tier))

    return "".join(parts())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=STAGES, help="run this stage (again)"
    )
    parser.add_argument(
        "--changed", nargs="+", choices=STAGES, default=[], metavar="NAME", help="see above"
    )
    parser.add_argument("--list", action="store_true", help="list the stages, run none")
    asked = parser.parse_args()
    known = rows(PAGE.read_text("utf-8")) if PAGE.exists() else {}
    failed = []
    if asked.list:
        for name, stage in STAGES.items():
            print(f"{name:14}{stage.about:8}{stage.shows}")
    else:
        chosen = list(asked.only or asked.changed or STAGES)
        for name in chosen:
            if asked.changed and unchanged(name, known):
                print(f"{name}: its files are those that passed (docs/verified.md)")
                continue
            good, known[name] = run(name, STAGES[name])
            failed += [] if good else [name]
            PAGE.write_text(page(known), "utf-8")
    PAGE.write_text(page(known), "utf-8")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
