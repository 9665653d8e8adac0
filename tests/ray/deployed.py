"""A deployment of ``veneer-ray`` on this machine, on a Ray that another team has started and
uses, and the processes that belong to it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.ports import free_port
from tests.ray.neighbour import Neighbour, neighbour
from tests.server_harness import Server

START_S = 600.0


@dataclass(frozen=True)
class Deployed:
    """Where it answers, and what it is made of.

    Attributes:
        other: whose Ray it runs on; None if that is not known.
        flags: the servers' flags.
    """

    grpc: str
    http: str
    data_dir: Path
    address: str
    environment: dict[str, str]
    flags: tuple[str, ...] = ()
    other: Neighbour | None = None

    def server(self) -> Server:
        """Stubs that talk to its ingress; it has no process of its own."""
        nothing: Any = None
        return Server(nothing, self.grpc, "", self.http)

    def engines(self) -> list[psutil.Process]:
        """The engines' servers; each one's parent is its replica."""
        return self._servers("engines")

    def registry(self) -> psutil.Process:
        """The registry's server; its parent is its replica."""
        (found,) = self._servers("registry")
        return found

    def servers_below(self, folder: Path) -> list[psutil.Process]:
        """All servers whose data is below a folder."""
        return _servers_of(str(folder))

    def _servers(self, folder: str) -> list[psutil.Process]:
        return _servers_of(str(self.data_dir / folder))

    def sequences(self) -> float:
        """Running and waiting, in all engines that answer."""
        return sum(sequences_of(process) for process in self.engines())

    def run(self, *arguments: str) -> str:
        """Another ``veneer-ray`` command on it."""
        done = self.tried(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def tried(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command that may fail."""
        command, *rest = arguments
        return subprocess.run(
            [sys.executable, "-m", "veneer_ray", command, "--address", self.address, *rest],
            capture_output=True,
            text=True,
            check=False,
            env=self.environment,
        )

    async def engines_are(self, count: int, seconds: float = START_S) -> float:
        """Seconds until ``veneer-ray status`` says that so many run, and no others."""
        began = time.monotonic()
        while True:
            status = await asyncio.to_thread(self.run, "status")
            if f"{count} RUNNING" in next(
                (line for line in status.splitlines() if line.startswith("engines")), ""
            ):
                return time.monotonic() - began
            assert time.monotonic() - began < seconds, status
            await asyncio.sleep(1)


def _servers_of(below: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            line = process.cmdline()
        except psutil.Error:
            continue
        if "veneer_server" in line and any(part.startswith(below) for part in line):
            found.append(process)
    return found


def sequences_of(process: psutil.Process) -> float:
    """Running and waiting in one; 0 if it does not answer."""
    try:
        ports = {
            each.laddr.port
            for each in process.net_connections("tcp")
            if each.status == psutil.CONN_LISTEN
        }
    except psutil.Error:
        return 0.0
    for port in ports:
        done = subprocess.run(
            ["curl", "-s", "-m", "5", f"http://127.0.0.1:{port}/metrics"],
            capture_output=True,
            text=True,
            check=False,
            errors="replace",
        )
        found = [
            float(line.rpartition(" ")[2])
            for line in done.stdout.splitlines()
            if line.startswith(("veneer_num_requests_running ", "veneer_num_requests_waiting "))
        ]
        if found:  # two of its ports have this page
            return sum(found)
    return 0.0


@contextmanager
def deployed(flags: tuple[str, ...]) -> Iterator[Deployed]:
    """Deploy beside another team's application, and end all of it."""
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    with (
        tempfile.TemporaryDirectory(prefix="veneer-ray-") as folder,
        neighbour(environment) as other,
    ):
        grpc, http = free_port(), free_port()
        made = Deployed(
            f"127.0.0.1:{grpc}",
            f"127.0.0.1:{http}",
            Path(folder),
            other.address,
            environment,
            flags,
            other,
        )
        began = time.monotonic()
        said = made.run(
            *("up", "--replicas", "2", "--data-dir", folder),
            *("--registry", f"127.0.0.1:{free_port()}"),
            *("--grpc-port", str(grpc), "--http-port", str(http), "--", *flags),
        )
        assert "ready: " in said, said
        print(f"  deployed in {time.monotonic() - began:.0f} s")
        yield made
