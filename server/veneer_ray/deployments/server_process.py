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
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import IO, Final

from veneer_registry.child_python import child_python

_CHILD: Final = "veneer_ray.deployments.child"
_START_S: Final = 1800.0
"""A first start may import a base of many gigabytes."""
_RAYS: Final = ("OMP_NUM_THREADS",)
"""Variables that Ray sets for its workers; without them the server makes better choices."""


class ServerProcess:
    """A running server: the constructor starts it and waits until it is ready. Its log goes to
    the replica's log, which Ray keeps.

    Args:
        flags: makes the server's flags; its argument is the file for the server's ports.
        on_lost: called from another thread with the exit status if the server ends without
            `stop`.

    Raises:
        RuntimeError: the server ended, or was not ready in time.
    """

    def __init__(
        self, flags: Callable[[Path], list[str]], on_lost: Callable[[int], None]
    ) -> None:
        self._on_lost = on_lost
        self._stopping = False
        self._ready: queue.SimpleQueue[bool] = queue.SimpleQueue()
        environment = {key: value for key, value in os.environ.items() if key not in _RAYS}
        with tempfile.TemporaryDirectory(prefix="veneer-ray-") as folder:
            ports = Path(folder) / "ports.json"
            self._process = subprocess.Popen(
                child_python("-m", _CHILD, str(os.getpid()), *flags(ports)),
                stdout=subprocess.PIPE,
                env=environment,
            )
            assert self._process.stdout is not None
            # Reads the output until the server ends. Note that `child`'s PDEATHSIG fires when
            # the thread that called Popen ends, and this may be a replica's constructor.
            threading.Thread(
                target=self._follow, args=(self._process.stdout,), daemon=True
            ).start()
            try:
                ready = self._ready.get(timeout=_START_S)
            except queue.Empty:
                ready = False
            if not ready:
                self.stop(0)
                raise RuntimeError("veneer-server did not start: see its output above")
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

    def _follow(self, output: IO[bytes]) -> None:
        for line in output:
            sys.stderr.write(line.decode(errors="replace"))
            if b"ready" in line:
                self._ready.put(True)
        code = self._process.wait()
        self._ready.put(False)
        if not self._stopping:
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
