"""Run a real PostgreSQL and an S3 server for tests, each in its own processes."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg
from veneer_registry.shared.locations import SharedLocations
from veneer_registry.shared.objects import Objects
from veneer_registry.shared.postgres import PostgresAddress

BUCKET = "veneer-tests"
_ROOT = Path(__file__).resolve().parents[1]
_USER = "nobody"
"""User that runs PostgreSQL if the tests run as root, which PostgreSQL refuses."""


def postgres_binary(name: str) -> str:
    """Return the path of a program of PostgreSQL's server; fail if it is not installed."""
    found = shutil.which(name)
    if found is None:
        versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
        found = str(versions[0]) if versions else None
    if found is None:
        raise AssertionError(
            f"{name} is not installed: these tests need PostgreSQL's server, Debian's package "
            "postgresql (apt-get install postgresql)"
        )
    return found


class PostgresServer:
    """A PostgreSQL server in its own folder, on a Unix socket, with a password.

    Attributes:
        port: TCP port on the loopback interface, too; None for the Unix socket alone.
        url: URL of the database, without the password.
        password_file: file with the password.
    """

    def __init__(self, port: int | None = None) -> None:
        self.port = port
        self.folder = Path(tempfile.mkdtemp(prefix="veneer-pg-"))
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            user = pwd.getpwnam(_USER)
            self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            os.chown(self.folder, user.pw_uid, user.pw_gid)
        self.password = secrets.token_hex(8)
        self.password_file = self.folder / "password"
        self.password_file.write_text(self.password + "\n")
        self.password_file.chmod(0o644)
        self.url = f"postgresql://veneer@/postgres?host={self.folder}"
        self.url += f"&port={port}" if port else ""
        self._data = self.folder / "data"
        self._run(
            postgres_binary("initdb"),
            "-D",
            self._data,
            "-U",
            "veneer",
            "-E",
            "UTF8",
            *("--locale=C", "--no-sync", "-A", "scram-sha-256"),
            f"--pwfile={self.password_file}",
        )
        self.process: subprocess.Popen[bytes]
        self.start()
        # If the tests are killed, their end of the pipe closes, and this stops PostgreSQL.
        pid = self._data / "postmaster.pid"
        self._guard = subprocess.Popen(
            ["sh", "-c", 'cat; kill -INT "$(head -n 1 "$0")"', str(pid)],
            stdin=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _run(self, *command: object) -> None:
        done = subprocess.run(
            list(map(str, command)), cwd=self.folder, capture_output=True, text=True, **self._as
        )
        assert done.returncode == 0, done.stderr

    def start(self) -> None:
        """Start the server, also after a stop or a kill, and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    postgres_binary("postgres"),
                    "-D",
                    str(self._data),
                    *("-k", str(self.folder)),
                    *("-c", f"listen_addresses={'127.0.0.1' if self.port else ''}"),
                    *(("-p", str(self.port)) if self.port else ()),
                    *("-c", "max_connections=60", "-c", "shared_buffers=16MB"),
                    *("-c", "fsync=on", "-c", "autovacuum=off"),
                ],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **self._as,
            )
        ready = [postgres_binary("pg_isready"), "-h", str(self.folder), "-q", "-t", "30"]
        ready += ["-p", str(self.port)] if self.port else []
        while subprocess.run(ready).returncode:
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]

    def kill(self) -> None:
        """Kill every process with SIGKILL, like a power cut of the database alone."""
        self.process.send_signal(signal.SIGSTOP)  # so that it starts no more processes
        children = psutil.Process(self.process.pid).children()
        self.process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        self.process.wait()
        # A new server refuses to start while any of them still holds the shared memory.
        _, left = psutil.wait_procs(children, timeout=60)
        assert not left, f"PostgreSQL's processes {left} do not end"

    def connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        """Open a connection for the test itself."""
        return psycopg.connect(self.url, password=self.password, autocommit=True)

    def stop(self) -> None:
        """Stop the server and remove its folder."""
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class S3Server:
    """Moto's S3 server in its own process, with a bucket; `fail` makes it misbehave."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fakes.s3_server"],
            cwd=_ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.endpoint = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        self.objects(BUCKET).fs.mkdir(BUCKET)

    def objects(self, prefix: str) -> Objects:
        """Return the objects under a prefix of the bucket."""
        url = f"s3://{BUCKET}" if prefix == BUCKET else f"s3://{BUCKET}/{prefix}"
        return Objects(url, endpoint_url=self.endpoint, key="test", secret="test")

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which a process finds the server."""
        return {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def fail(self, **faults: Any) -> None:
        """Set the faults from now on, see `fakes.s3_server`; no argument: no faults."""
        request = urllib.request.Request(
            f"{self.endpoint}/_faults", json.dumps(faults).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            answer.read()

    def stop(self) -> None:
        """Stop the server and lose everything that it stored."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


class Services:
    """PostgreSQL and S3, and locations in them by name. The same name always means the same
    catalog and store."""

    def __init__(self) -> None:
        self.postgres = PostgresServer()
        try:
            self.s3 = S3Server()
        except BaseException:
            self.postgres.stop()
            raise

    def address(self, name: str) -> PostgresAddress:
        """Return the address of the catalog with that name."""
        return PostgresAddress(self.postgres.url, self.postgres.password_file, f"t_{name}")

    def places(self, name: str, data: Path, *, cache_bytes: int = 1 << 30) -> SharedLocations:
        """Return the locations with that name for a registry whose own folder is ``data``."""
        return SharedLocations(
            data, self.address(name), self.s3.objects(name), cache_bytes=cache_bytes
        )

    def stop(self) -> None:
        """Stop both services."""
        self.s3.stop()
        self.postgres.stop()


@contextlib.contextmanager
def running() -> Iterator[Services]:
    """Run both services during the block."""
    services = Services()
    try:
        yield services
    finally:
        services.stop()
