"""The FAKE fast server as a child process, as a context manager."""

from __future__ import annotations

import json
import subprocess
import sys
from types import TracebackType


class FastTarget:
    """Runs `tests.fakes.fast_server`.

    Attributes:
        grpc, http: ``HOST:PORT``.
        counts: the server's counts, available after the ``with``.
    """

    def __init__(self, *, stall: str = "0:0") -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.fast_server", "--stall", stall],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        addresses = json.loads(self._process.stdout.readline())
        self.grpc: str = addresses["grpc"]
        self.http: str = addresses["http"]
        self.counts: dict[str, int] = {}

    def __enter__(self) -> FastTarget:
        return self

    def kill(self) -> None:
        """Kill it, as an out-of-memory killer does."""
        self._process.kill()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        told, _ = self._process.communicate()
        if told:
            self.counts = json.loads(told)
