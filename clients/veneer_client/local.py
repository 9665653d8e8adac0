"""Runs ``veneer-server`` as a child process, for demos and load tests."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from veneer_registry.child_python import child_python
from veneer_registry.errors import ServerUnreachable

__all__ = ["LocalServer"]

_LOG_TAIL: int = 12
_LOOK_S: float = 0.2


class LocalServer:
    """Starts a server on free ports, waits until it is ready, stops it cleanly.

    Needs the ``[server]`` extra in this Python. Data goes to a temporary folder
    unless ``flags`` name one; the log is at `log_path` until `stop`.

    Attributes:
        address: ``HOST:PORT`` of gRPC.
        url: the address to give to clients: ``http://HOST:PORT``, which says that there is no
            TLS, or `address` if ``flags`` name a certificate.
        metrics_address: ``HOST:PORT`` of Prometheus.
        data_dir: where adapters are stored, unless ``flags`` say otherwise.
        ready_line: the line that the server printed when it was ready.
        command: the command line, for reports.
    """

    def __init__(
        self,
        flags: Sequence[str] = (),
        *,
        environment: Mapping[str, str] | None = None,
        start_timeout_s: float = 300.0,
        told: Callable[[str], None] | None = None,
    ) -> None:
        """Start, and return when the server is ready.

        Args:
            flags: command-line flags of ``veneer-server``.
            environment: the process's environment; None inherits this process's.
            told: called from another thread with each line of the server's log until it is
                ready: the first start on a machine takes a minute, and the log says why.

        Raises:
            ServerUnreachable: it ended or was not ready in time; the message has its last log
                lines.
        """
        self._folder = tempfile.TemporaryDirectory(prefix="veneer-")
        folder = Path(self._folder.name)
        self.log_path = folder / "server.log"
        ports = folder / "ports.json"
        own = ["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"]
        self.data_dir = folder / "data"
        own += ["--data-dir", str(self.data_dir), "--port-file", str(ports)]
        # The caller's flags come last, and the last one wins.
        command = child_python("-m", "veneer_server", "serve", *own, *flags)
        self.command = " ".join(["veneer-server", *flags])
        with self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=None if environment is None else dict(environment),
                # Ctrl-C in a terminal goes only to the parent, which stops the child.
                start_new_session=True,
            )
        try:
            with self._telling(told):
                self.ready_line = self._wait_until_ready(ports, start_timeout_s)
            addresses = json.loads(ports.read_text("utf-8"))
        except BaseException:
            self._process.kill()
            self._close()
            raise
        self.address: str = addresses["grpc"]
        tls = any(flag.startswith("--tls-cert") for flag in flags)
        # A VENEER_CA that is meant for another server must not turn TLS on for this one.
        self.url = self.address if tls else f"http://{self.address}"
        self.metrics_address: str = addresses["metrics"]
        # Drain the pipe so that it does not fill up; its content is no longer needed.
        self._drain = threading.Thread(target=self._process.communicate, daemon=True)
        self._drain.start()

    @property
    def pid(self) -> int:
        """Process id of the server's front process."""
        return self._process.pid

    def __enter__(self) -> LocalServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def log_tail(self, lines: int = _LOG_TAIL) -> str:
        """The last lines of the server's log."""
        text = self.log_path.read_text("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-lines:])

    def stop(self, *, grace_s: float = 30.0) -> int:
        """Send SIGTERM, wait, and return the exit status (0 after a clean stop).

        A second call returns the same status.
        """
        self._process.send_signal(signal.SIGTERM)  # does nothing once it has ended
        try:
            status = self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._drain.join()
        self._close()
        return status

    @contextmanager
    def _telling(self, told: Callable[[str], None] | None) -> Iterator[None]:
        if told is None:
            yield
            return
        over = threading.Event()

        def follow() -> None:
            with self.log_path.open(encoding="utf-8", errors="replace") as log:
                last = False
                while not last:
                    last = over.wait(_LOOK_S)
                    for line in log:
                        told(line.rstrip())

        follower = threading.Thread(target=follow, name="server-log", daemon=True)
        follower.start()
        try:
            yield
        finally:
            over.set()
            follower.join()

    def _wait_until_ready(self, ports: Path, timeout_s: float) -> str:
        output: Any = self._process.stdout
        guard = threading.Timer(timeout_s, self._process.kill)
        # A signal may come before `try`: the program that it ends must not wait for the timer.
        guard.daemon = True
        guard.start()
        try:
            # The server writes the port file before its ready line.
            for line in output:
                if ports.exists():
                    return str(line).strip()
        finally:
            guard.cancel()
        status = self._process.wait()
        raise ServerUnreachable(
            f"the server exited with status {status} before it was ready "
            f"(allowed {timeout_s:g} s); run `{self.command}` to see why. Its last lines:\n"
            f"{self.log_tail()}",
            metadata={"status": str(status), "command": self.command},
        )

    def _close(self) -> None:
        self._process.wait()
        if self._process.stdout is not None and not self._process.stdout.closed:
            self._process.stdout.close()
        self._folder.cleanup()
