"""Another team's Serve application, on a Ray of its own that we join: ``python -m
tests.ray.neighbour PORT``. It prints its Ray's address, and ends when its input does."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.request import urlopen

from tests.ports import free_port


@dataclass(frozen=True)
class Neighbour:
    """Where it runs.

    Attributes:
        address: of its Ray.
        port: Serve's HTTP port, at which it answers.
        words: its answer, another one from each of its processes.
    """

    address: str
    port: int
    words: str

    def check(self) -> None:
        """Its process is the one that it was."""
        assert asked(self.port) == self.words, "the other team's application was restarted"


@contextmanager
def neighbour(environment: dict[str, str]) -> Iterator[Neighbour]:
    """Start it, and end it with its Ray."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.ray.neighbour", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        found = ""
        for line in process.stdout:
            if line.startswith("neighbour "):
                found = line.split()[1]
                break
        assert found, "Ray or Serve did not start"
        yield Neighbour(found, port, asked(port))
    finally:
        process.stdin.close()
        process.wait(60)


def asked(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/", timeout=30) as answer:
        return str(answer.read().decode())


def main() -> None:
    """Entry point."""
    import ray
    from ray import serve

    ray.init(address="local", include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})

    class Greets:
        def __init__(self) -> None:
            self._words = f"hello from {uuid.uuid4()}"

        def __call__(self, request: Any) -> str:
            return self._words

    serve.run(serve.deployment(Greets).bind(), name="greets", route_prefix="/")
    print("neighbour", ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
