"""What compilers say of the C++ without running it: ``python -m tests.sanitize.static``.

Every warning of ``-Wall -Wextra`` is an error, in each form that a wheel brings: the headers of
an instruction set are seen by its own form alone. Part of ``make check``. Exits 1 with what was
said, if anything was.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from veneer_server.native.forms import FLAGS, FORMS

__all__: list[str] = []

REPOSITORY = Path(__file__).resolve().parents[2]
KERNELS = REPOSITORY / "server" / "veneer_server" / "native" / "cpp"
SOURCES = (
    KERNELS / "library.cpp",
    REPOSITORY / "tests" / "sanitize" / "team.cpp",
    REPOSITORY / "tests" / "bench" / "limits.cpp",
)
# -O1: some warnings come from what the optimizer finds out.
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-O1", "-c", f"-I{KERNELS}")


def compilations() -> Iterator[tuple[str, Sequence[str]]]:
    """Each source in each form: its name, and the command."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [flag for flag in FLAGS if flag != "-shared"]
    for form in FORMS:
        for source in SOURCES:
            if source.name == "limits.cpp" and form is not FORMS[0]:
                continue  # measures what only that form has
            command = [*compiler, *flags, *form.flags, *WARNINGS, "-o", os.devnull, str(source)]
            yield f"-Wall -Wextra, {form.name}: {source.name}", command


def main() -> int:
    """Run all; the exit status."""
    failed = False
    for name, command in compilations():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"{name}: {'FAILED' if done.returncode else 'clean'}")
        if done.returncode:
            failed = True
            print(done.stdout + done.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
