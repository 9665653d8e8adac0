"""Record, or break, file operations of a child process with strace.

Unlike patches of Python's functions, strace also sees what SQLite does.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

SEEN: Final = (
    "openat,close,lseek,write,pwrite64,writev,pwritev,pwritev2,copy_file_range,sendfile,"
    "ftruncate,truncate,fallocate,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,"
    "mkdir,mkdirat,unlink,unlinkat,rmdir,link,linkat,symlink,symlinkat,dup,dup2,dup3"
)
ROOT: Final = Path(__file__).parents[2]

_LINE: Final = re.compile(r"(\w+)\((.*)\)\s+= (-?\d+|\?)(<[^>]*>)?(.*)")
_ARGUMENT: Final = re.compile(
    r'(?:AT_FDCWD|-?\d+)<[^>]*>(?:\(deleted\))?|"[^"]*"(?:\.\.\.)?|[^,\s]+'
)


@dataclass(frozen=True, slots=True)
class Call:
    """One system call.

    Attributes:
        name: for example ``openat``.
        arguments: numbers and flags as text, strings as bytes; a descriptor is its number.
        result: the returned value, -1 for an error.
        number: number of the call among the process's calls of this name, from 1.
        injected: whether strace made it fail.
    """

    name: str
    arguments: tuple[str | bytes, ...]
    result: int
    number: int
    injected: bool

    def path(self, at: int) -> str:
        """Return argument ``at`` as a path; the caller must resolve the folder descriptors of
        ``*at`` calls."""
        value = self.arguments[at]
        return os.fsdecode(value) if isinstance(value, bytes) else value


@functools.cache
def missing_strace() -> str:
    """Return why calls cannot be traced here, and what to do; "" if they can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt-get install strace)"
    tried = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"strace may not trace here ({tried.stderr.strip()[:120]}); allow SYS_PTRACE"
    return ""


def trace(
    module: str, arguments: Sequence[str], log: Path, *, inject: str = "", reads: bool = False
) -> tuple[int, str, str, list[Call]]:
    """Run ``python -m module arguments``; return exit status, stdout, stderr and its calls.

    Args:
        log: file for strace's output.
        inject: as in ``strace -e inject=``, for example ``fsync:error=EIO:when=3``.
        reads: also trace `read`, which moves a file's position.

    This traces only the main thread. Byte code is not written and hashes are fixed, so that
    the n-th call of one run is the n-th call of the next.
    """
    command = ["strace", "-o", str(log), "-xx", "-y", "-s", "1048576"]
    command += ["-e", f"trace={SEEN},read" if reads else f"trace={SEEN}"]
    if inject:
        command += ["-e", f"inject={inject}"]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}
    # numpy needs no threads here.
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, sys.executable, "-m", module, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    return ended.returncode, ended.stdout, ended.stderr, list(_parse(log))


def _parse(log: Path) -> Iterator[Call]:
    counts: dict[str, int] = {}
    for line in log.read_text().splitlines():
        match = _LINE.match(line)
        if match is None or match[3] == "?":
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        arguments = tuple(_argument(text) for text in _ARGUMENT.findall(match[2]))
        injected = "(INJECTED)" in match[5]
        yield Call(name, arguments, int(match[3]), counts[name], injected)


def _argument(text: str) -> str | bytes:
    if text.startswith('"'):
        if text.endswith("..."):
            raise ValueError("strace cut a string short")
        return bytes.fromhex(text[1:-1].replace("\\x", ""))
    return text.partition("<")[0]
