"""The demo leaves nothing behind, whenever it is stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

DEMO = Path(__file__).parents[3] / "examples" / "demo.py"

STARTING_SERVER = """
import os, sys, threading
with open(os.environ["ALIVE"], "w") as alive:
    print(os.getpid(), file=alive, flush=True)
    threading.Event().wait()
"""
"""A FAKE server that never gets ready; its end closes the pipe."""

INTERRUPTED_AS_THE_LIMIT_BEGINS = """
import threading
from veneer_client.local import LocalServer

class Timer(threading.Timer):
    def start(self):
        super().start()
        raise KeyboardInterrupt  # a signal between two instructions

threading.Timer = Timer
LocalServer()
"""


def test_the_limit_of_a_start_does_not_keep_the_program() -> None:
    """It is 300 s."""
    program = [sys.executable, "-c", INTERRUPTED_AS_THE_LIMIT_BEGINS]
    ended = subprocess.run(program, stderr=subprocess.PIPE, text=True, timeout=120)
    assert ended.returncode == -signal.SIGINT, ended.stderr


@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_while_its_server_starts_it_stops_that_too(
    tmp_path: Path, by: signal.Signals, status: int
) -> None:
    package = tmp_path / "veneer_server"
    package.mkdir()
    (package / "__main__.py").write_text(STARTING_SERVER)
    (package / "__init__.py").touch()
    pipe = tmp_path / "alive"
    os.mkfifo(pipe)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "ALIVE": str(pipe)}
    demo = subprocess.Popen(
        [sys.executable, str(DEMO)],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # A suite that a shell runs in the background ignores SIGINT, and its children would.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    with pipe.open() as alive:
        server = int(alive.readline())
        try:
            demo.send_signal(by)
            _, told = demo.communicate(timeout=240)
            assert demo.returncode == status
            assert ("are kept; `make demo` resumes" in told) is (by == signal.SIGINT)
            assert alive.read() == ""
        except BaseException:
            os.kill(server, signal.SIGKILL)
            demo.kill()
            demo.wait()
            raise
