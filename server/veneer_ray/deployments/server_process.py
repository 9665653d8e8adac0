"""A ``veneer-server`` that runs as a replica's child process."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from pathlib import Path
from typing import Final

from veneer_registry.child_python import child_python

_CHILD: Final = "veneer_ray.deployments.child"
_START_S: Final = 1800.0
"""A first start may import a base of many gigabytes."""
_READY: Final = b"veneer ready"
"""Begins the line with which the server says so; it has written its ports before."""
_SAID: Final = 3
"""Lines of the output of a server that does not start that are told."""
_RAYS: Final = ("OMP_NUM_THREADS",)
"""Variables that Ray sets for its workers; without them the server makes better choices."""


class ServerProcess:
    """A running server: the constructor starts it and waits until it is ready. Its log goes to
    the replica's log, which Ray keeps.

    Args:
        flags: makes the server's flags; its argument is the file for the server's ports.
        on_lost: called from another thread with the exit status if the server ends without
            `stop` after it was ready.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
        OSError: it could not be started.
    """

    def __init__(
        self, flags: Callable[[Path], list[str]], on_lost: Callable[[int], None]
    ) -> None:
        self._on_lost = on_lost
        self._stopping = False
        self._started: Future[subprocess.Popen[bytes]] = Future()
        self._ready: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._said: deque[str] = deque(maxlen=_SAID)
        environment = {key: value for key, value in os.environ.items() if key not in _RAYS}
        with tempfile.TemporaryDirectory(prefix="veneer-ray-") as folder:
            ports = Path(folder) / "ports.json"
            command = child_python("-m", _CHILD, str(os.getpid()), *flags(ports))
            threading.Thread(target=self._run, args=(command, environment), daemon=True).start()
            self._process = self._started.result()
            try:
                ready = self._ready.get(timeout=_START_S)
            except queue.Empty:
                ready = False
            if not ready:
                self.stop(0)
                raise RuntimeError(f"veneer-server did not start: {' '.join(self._said)}")
            told = json.loads(ports.read_text("utf-8"))
        self.grpc = str(told["grpc"])
        self.openai = str(told["openai"])
        self.metrics = str(told["metrics"])

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def stop(self, grace_s: float) -> None:
        """Let the server finish its calls; kill it after ``grace_s``. Idempotent."""
        self._stopping = True
        if not self.running:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        """Start the server and pass on its output until it ends. Runs in a thread of its own,
        because `child`'s PDEATHSIG fires when the thread that called Popen ends, and a
        replica's constructor may run in one that does."""
        try:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, env=environment)
        except BaseException as error:
            self._started.set_exception(error)
            return
        self._started.set_result(process)
        assert process.stdout is not None
        ready = False
        with process.stdout as output:
            for line in output:
                text = line.decode(errors="replace")
                sys.stderr.write(text)
                self._said.append(text.strip())
                if line.startswith(_READY):
                    ready = True
                    self._ready.put(True)
        code = process.wait()
        self._ready.put(False)
        if ready and not self._stopping:
            self._on_lost(code)


class ReplicaFolder:
    """A replica's data folder: the first of ``0``, ``1``, ... below a folder that no other
    process of this machine has locked. So a replacement finds its predecessor's cached
    weights."""

    def __init__(self, below: Path) -> None:
        below.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in count():
            file = os.open(
                below / f"{number}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600
            )
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                continue
            self._file = file  # held until this process ends
            self.path = below / str(number)
            return
