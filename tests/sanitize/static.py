"""Static checks of the C++: ``python -m tests.sanitize.static``.

Every warning of ``-Wall -Wextra`` is an error, for each instruction set that a wheel contains,
since only that build compiles the set's headers; for ARM by the compiler that ``make tools``
brings, without which those are left out, except in CI. clang-format (``.clang-format``;
``--format`` writes) and clang-tidy (``.clang-tidy``) are those of the dev extra. Part of
``make check``. Exits 1 with the tools' output if there is any.
"""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from veneer_server.backends.native.forms import FLAGS, FORMS, InstructionSet, forms_of

from tests.arm import tools

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "server" / "veneer_server" / "backends" / "native" / "cpp"
SOURCES = (
    KERNELS / "library.cpp",
    REPOSITORY / "tests" / "sanitize" / "thread_pool.cpp",
    REPOSITORY / "tests" / "sanitize" / "decoder.cpp",
    REPOSITORY / "tests" / "bench" / "limits.cpp",
    REPOSITORY / "tests" / "bench" / "thread_pool.cpp",
)
# -O1: some warnings need the optimizer's analysis.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-O1", "-c", f"-I{KERNELS}")


def compilations() -> Iterator[tuple[str, Sequence[str]]]:
    """Name and command to compile each source in each form."""
    flags = [flag for flag in FLAGS if flag != "-shared"]
    for form in here():
        x86 = form.machine == "x86_64"
        compiler = shlex.split(os.environ.get("CXX", "c++")) if x86 else [str(tools.CXX)]
        for source in SOURCES if x86 else (KERNELS / "library.cpp", tools.DRIVER):
            if source.name == "limits.cpp" and form is not FORMS[0]:
                continue  # measures something that only that form has
            command = [*compiler, *flags, *form.flags, *WARNINGS, "-o", os.devnull, str(source)]
            yield f"-Wall -Wextra, {form.name}: {source.name}", command


@functools.cache
def here() -> list[InstructionSet]:
    """The forms that can be compiled here."""
    if not (said := tools.missing()) or os.environ.get("CI"):
        return list(FORMS)
    print(f"the kernels for ARM are NOT CHECKED: {said}")
    return forms_of("x86_64")


def tool(name: str) -> str:
    """A program of the dev extra, next to this Python; else one on the PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def formatting(write: bool) -> tuple[str, Sequence[str]]:
    """Command to check the formatting of all C++."""
    files = [*KERNELS.rglob("*.h"), *SOURCES, tools.DRIVER]
    how = ["-i"] if write else ["--dry-run", "-Werror"]
    return "clang-format", [tool("clang-format"), *how, *map(str, sorted(files))]


def tidying() -> Iterator[tuple[str, Sequence[str]]]:
    """Commands to check each form of the kernels, whose headers library.cpp includes."""
    for form in here():
        command = [tool("clang-tidy"), "--quiet", str(KERNELS / "library.cpp")]
        flags = [flag for flag in FLAGS if flag != "-shared"]
        if form.machine != "x86_64":
            flags += ["--target=aarch64-linux-gnu", f"--sysroot={tools.ROOT}"]
            flags.append(f"--gcc-toolchain={tools.ROOT / 'usr'}")
        yield f"clang-tidy, {form.name}", [*command, "--", *flags, *form.flags]


def passes(name: str, command: Sequence[str]) -> bool:
    """Run a command; print its output if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        print(f"{name}: {command[0]} is not installed (make install)")
        return False
    print(f"{name}: {'FAILED' if done.returncode else 'clean'}", flush=True)
    if done.returncode:
        print(done.stdout + done.stderr)
    return done.returncode == 0


def main() -> int:
    """Run all checks; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.sanitize.static", description=__doc__)
    parser.add_argument("--format", action="store_true", help="format the C++, no more")
    if parser.parse_args().format:
        return 0 if passes(*formatting(write=True)) else 1
    # The longest first.
    commands = (*tidying(), *compilations(), formatting(write=False))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        results = list(threads.map(lambda command: passes(*command), commands))
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
