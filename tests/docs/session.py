"""Runs a page's blocks in one bash, as if pasted one after another.

The session has a copy of the repository to write to, an empty home, this environment's
programs first on PATH, and, if the system allows it, a separate network in which the page's
ports are free and nothing outside can be reached.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from tests.backends_ran import server_environment
from tests.docs.pages import REPOSITORY, Block

PORTS: Final = (50051, 9095, 8000)
"""Ports that the pages use."""
_OWN: Final = (
    ("unshare", "--net"),
    ("unshare", "--net", "--map-root-user"),
)
_LOOPBACK_UP: Final = """\
import fcntl, os, socket, struct, sys
with socket.socket() as any_socket:  # SIOCSIFFLAGS, IFF_UP
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh", b"lo", 1))
os.execvp(sys.argv[1], sys.argv[1:])
"""
_LEFT_OUT: Final = shutil.ignore_patterns(
    ".git", ".venv*", ".cache", ".*_cache", "__pycache__", "*.egg-info", "build", "dist"
)
_STOPS_S: Final = 30


@functools.cache
def _own_network() -> tuple[str, ...]:
    """Prefix that runs a command in a separate network; empty if that is impossible."""
    up = (sys.executable, "-c", _LOOPBACK_UP)
    for unshare in _OWN:
        if shutil.which(unshare[0]) is None:
            continue
        tried = subprocess.run((*unshare, *up, "true"), capture_output=True, check=False)
        if tried.returncode == 0:
            return (*unshare, *up)
    return ()


def busy_ports() -> list[int]:
    """Ports that a page needs but another program on this machine uses."""
    if _own_network():
        return []
    busy = []
    for port in PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                busy.append(port)
    return busy


@dataclass(frozen=True)
class Ran:
    """A block's output, both streams as on a terminal, and a sentence for each failed
    command."""

    printed: str
    failures: list[str]
    seconds: float


class Session:
    """A bash that reads blocks from us. Everything that it starts ends with it."""

    def __init__(self, folder: Path, cache_dir: Path) -> None:
        self._notes, self._count = folder / "session", 0
        self._notes.mkdir()
        home, work = folder / "home", folder / "veneer"
        home.mkdir()
        shutil.copytree(REPOSITORY, work, ignore=_LEFT_OUT)
        (work / ".venv").symlink_to(sys.prefix)
        programs = Path(sys.executable).parent
        environment = server_environment() | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "VENEER_CACHE_DIR": str(cache_dir),
            "HF_HUB_OFFLINE": "1",
            "OMP_WAIT_POLICY": "passive",
            "COLUMNS": "100",
            "TERM": "dumb",
        }
        for name in [name for name in environment if name.startswith(("XDG_", "PYTEST_"))]:
            del environment[name]
        self._bash = subprocess.Popen(
            (*_own_network(), "bash", "--noprofile", "--norc"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=work,
            env=environment,
            start_new_session=True,
        )
        # A pasted block continues after a failed command; each failure is recorded. Bash exits
        # when its input ends, even if this process is killed, and then ends its process group.
        told = f'echo "line $LINENO: exit $code: $BASH_COMMAND" >> {self._notes}/failures'
        self._send(f"set -E; trap 'code=$?; {told}' ERR")
        self._send("trap 'trap \"\" TERM; kill 0; wait' EXIT")

    def _send(self, line: str) -> None:
        assert self._bash.stdin is not None
        self._bash.stdin.write(line.encode() + b"\n")
        self._bash.stdin.flush()

    def run(self, block: Block, limit_s: float) -> Ran:
        """Paste the block and wait for its commands, except those with ``&``."""
        self._count += 1
        file = self._notes / f"{self._count}.{'py' if block.language == 'python' else 'sh'}"
        file.write_text(block.text, "utf-8")
        output, failed = file.with_suffix(".out"), self._notes / "failures"
        failed.unlink(missing_ok=True)
        how = "python" if block.language == "python" else "source"
        began = time.monotonic()
        end = f"block {self._count} has ended"
        self._send(f"{how} {file} > {output} 2>&1 < /dev/null; echo {end}")
        ended = self._wait_for(end, limit_s)
        failures = failed.read_text("utf-8").splitlines() if failed.exists() else []
        if block.language == "sh":  # `source` reports a failure at its end again
            own = f": source {file}"
            failures = [failure for failure in failures if own not in failure] or failures
        if not ended:
            failures.append(f"not ended after {limit_s:.0f} s, or it ended the shell")
        printed = output.read_bytes().decode("utf-8", "replace") if output.exists() else ""
        return Ran(printed, failures, time.monotonic() - began)

    def _wait_for(self, line: str, limit_s: float) -> bool:
        """Whether bash prints the line within that time."""
        assert self._bash.stdout is not None
        # Only bash holds the pipe: killing bash ends the pipe and the loop.
        timer = threading.Timer(limit_s, self._kill)
        timer.start()
        try:
            return any(said.decode().strip() == line for said in self._bash.stdout)
        finally:
            timer.cancel()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._bash.pid, signal.SIGKILL)

    def close(self) -> None:
        """Stop everything that the page left running, with SIGTERM to servers first."""
        assert self._bash.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._bash.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._bash.wait(_STOPS_S)
        self._kill()
        self._bash.wait()
        assert self._bash.stdout is not None
        self._bash.stdout.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
