"""The kernels' tests under sanitizers: ``python -m tests.sanitize`` (``make sanitize``).

AddressSanitizer and UndefinedBehaviorSanitizer run over the tests of the native kernels: the
backend compiles them as usual, with ``tests/sanitize/c++`` as the compiler, so the tests use an
instrumented library. Python, numpy and torch are not instrumented, but their allocations have
ASan's red zones, so a kernel that reads or writes past one is caught. Packed weights are in
mapped pages, where an error within a piece is not caught. ThreadSanitizer cannot be loaded into
Python: `thread_pool.cpp` drives thread_pool.h alone, `decoder.cpp` whole steps of the real
decoder.

Exits 1, with the sanitizer's report printed, if any of it fails.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
KERNELS = REPOSITORY / "server" / "veneer_server" / "backends" / "native" / "cpp"
TESTS = ("tests/unit/server/native", "tests/unit/server/engine/test_sampler.py")
FORMS = ("best", "avx2", "software-matrix and (test_kernels or test_int8) and not over_pieces")
"""Instruction sets, as named by the tests' fixture. The software model of matrix registers is
slow: of its tests those of each kernel alone are enough, without the longest contexts."""


def _compiler() -> list[str]:
    """GCC, since its sanitizers are shared libraries under these names."""
    return shlex.split(os.environ.get("VENEER_CXX", "g++"))


def _preloaded() -> str:
    """Libraries to preload: the sanitizers, and the C++ library whose exceptions ASan
    intercepts."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    found = [
        subprocess.check_output([*_compiler(), f"-print-file-name={name}"], text=True).strip()
        for name in names
    ]
    return " ".join(found)


def _kernel_tests(form: str) -> tuple[bool, str]:
    """Whether the tests pass with one form of the kernels, and their output."""
    environment = {
        **os.environ,
        "CXX": str(HERE / "c++"),
        "LD_PRELOAD": _preloaded(),
        # Python frees little memory at exit, so leaks cannot be detected.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_WAIT_POLICY": "passive",
    }
    # No capture: a report ends the process, and captured output would be lost.
    chosen = ["--capture=no", "--timeout=600", "-x", "-k", form, *TESTS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *chosen],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode == 0, done.stdout.strip()


class _Programs:
    """Programs of this folder with ThreadSanitizer, each built once, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._builds: defaultdict[tuple[str, ...], Lock] = defaultdict(Lock)

    def run(
        self, name: str, *words: str, defined: Sequence[str] = (), reports: bool = False
    ) -> tuple[bool, str]:
        """Run one; with ``reports``, it continues after a report, and reports are not
        failures."""
        program = self._folder / "-".join((name, *defined))
        with self._builds[name, *defined]:
            if not program.exists():
                flags = ["-std=c++17", "-O1", "-g", "-fsanitize=thread", "-pthread"]
                flags += ["-mavx2", "-mfma", "-DVENEER_STALLS", *(f"-D{m}" for m in defined)]
                command = [*_compiler(), *flags, f"-I{KERNELS}", "-o", program]
                built = subprocess.run(
                    [*map(str, command), str(HERE / f"{name}.cpp")],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if built.returncode:
                    return False, built.stderr.strip()
        # Before GCC 14, TSan dies if the kernel randomizes addresses with more than 28 bits.
        fixed = ["setarch", "-R"] if shutil.which("setarch") else []
        options = "halt_on_error=0 exitcode=0" if reports else "halt_on_error=1"
        done = subprocess.run(
            [*fixed, program, *words],
            env={**os.environ, "TSAN_OPTIONS": options},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode == 0, (done.stdout + done.stderr).strip()


def _double_writes(programs: _Programs) -> tuple[bool, str]:
    """Chunks executed twice at the same time: there are no reports if their results are
    accessed by relaxed atomics. The same run with plain memory is the control: it must have
    reports, each about two chunks, and none about a chunk and the code between phases."""
    passed, told = programs.run("decoder", "stalls", defined=["VENEER_ATOMIC_NUMBERS"])
    if not passed:
        return False, told
    passed, told = programs.run("decoder", "stalls", reports=True)
    reports = told.split("WARNING: ThreadSanitizer: data race")[1:]
    others = [report for report in reports if report.count("veneer::Decoder::chunk(") < 2]
    if not passed or not reports or others:
        return False, "\n".join(others) or told
    return True, f"clean; in plain memory {len(reports)} reports, each of two chunks"


def main() -> int:
    """Run everything, two at a time; returns the exit status."""
    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="veneer-sanitize-") as folder,
        ThreadPoolExecutor(2) as pool,
    ):
        programs = _Programs(Path(folder))
        waiting = {
            f"address, undefined: {form}": pool.submit(_kernel_tests, form) for form in FORMS
        }
        waiting["thread: thread_pool.h"] = pool.submit(programs.run, "thread_pool")
        waiting["thread: decoder.h"] = pool.submit(programs.run, "decoder")
        twice = pool.submit(_double_writes, programs)
        waiting["thread: decoder.h, chunks executed twice"] = twice
        results = {name: future.result() for name, future in waiting.items()}
    for name, (passed, told) in results.items():
        # A passed run says so in its last line.
        print(f"--- {name}: {'passed' if passed else 'FAILED'}")
        print(told.splitlines()[-1] if passed else told)
    print(f"{time.monotonic() - began:.0f} s")
    return 0 if all(passed for passed, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
