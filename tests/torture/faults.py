"""The program into which row 5 injects faults: it makes changes, and retries after a fault.

``python -m tests.torture.faults DATA ADAPTERS`` prints one JSON line per event. strace makes
one of its system calls fail between a ``begin`` and its ``end``. The program prints the
registry's error, whether other names were served meanwhile, and what is left, for row 5 to
judge.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from veneer_registry.errors import VeneerError
from veneer_registry.registry import Registry
from veneer_registry.stored_adapter import verify_weights

from tests.torture.history import make_contents, open_registry
from tests.unit.registry.kit import push

__all__ = ["PLANTED", "make_contents", "residue"]


def say(event: str, **facts: Any) -> None:
    """Print one JSON line in one system call."""
    os.write(1, (json.dumps({"event": event, **facts}) + "\n").encode())


class Player:
    """The registry under faults, and the changes that it has acknowledged so far."""

    def __init__(self, data: Path, adapters: Path) -> None:
        self.data = data
        self.adapters = adapters
        self.registry = open_registry(data)
        self.promised: dict[str, str] = {}
        for name, content in (("keep", 0), ("chat", 1), ("old", 2)):
            self.publish(name, content)

    def publish(self, name: str, content: int) -> None:
        folder = self.adapters / str(content)
        published = push(self.registry, name, folder, allow_replace=True)
        self.promised[name] = published.record.ref.revision

    def delete(self, name: str) -> None:
        self.registry.delete(name)
        self.promised.pop(name)

    def reopen(self) -> None:
        self.registry.close()
        self.registry = open_registry(self.data)

    def steps(self) -> dict[str, Callable[[], None]]:
        """Return the steps in which to inject faults, in order."""
        return {
            "replace": lambda: self.publish("chat", 3),
            "publish": lambda: self.publish("new", 4),
            "delete": lambda: self.delete("old"),
            "restart": self.reopen,
        }

    def attempt(self, step: str, change: Callable[[], None]) -> bool:
        """Try one change and print the outcome; return True if it was acknowledged."""
        say("begin", step=step)
        try:
            change()
        except Exception as error:
            code = error.code if isinstance(error, VeneerError) else ""
            say("end", step=step, error=type(error).__name__, code=code, text=str(error)[:200])
            return False
        say("end", step=step)
        return True

    def check_others(self, after: str) -> None:
        """Check that the content of the kept names is intact, also after a failed change."""
        for name in ("keep", "chat"):
            try:
                with self.registry.acquire(name) as lease:
                    ref = lease.record.ref
                    verify_weights(self.registry.weights_folder(ref), ref.weights_digest)
            except Exception as error:
                say("broken", after=after, name=name, error=f"{type(error).__name__}: {error}")

    def play(self) -> None:
        for step, change in self.steps().items():
            if not self.attempt(step, change):
                if step != "restart":
                    self.check_others(step)
                if not self.attempt(f"{step} again", change):
                    say("broken", after=step, error="the second try failed too")
                    if step == "restart":
                        return
            self.check_others(step)
        self.registry.sweep()
        # As the server does periodically; a refused upload may be resumable until then.
        self.registry.sweep_uploads(0)
        say("left", residue=residue(self.data, self.registry))
        self.registry.close()
        say("promised", names=self.promised)


def residue(data: Path, registry: Registry) -> list[str]:
    """Return content of the store's folders that nothing refers to."""
    kept = [old.ref for r in registry.list() for old in registry.revisions(r.ref.name)]
    store = data / "store"
    wanted = {
        "weights": {ref.weights_digest for ref in kept},
        "revisions": {ref.revision for ref in kept},
        "staging": set(),
        "uploads": set(),
    }
    found = {folder: {path.name for path in (store / folder).iterdir()} for folder in wanted}
    return [
        f"{folder}/{name[:12]}"
        for folder in wanted
        for name in sorted(found[folder] ^ wanted[folder])
    ]


@contextlib.contextmanager
def deaf_fsync() -> Iterator[None]:
    """A planted bug: errors of fsync are ignored."""
    real = os.fsync

    def fsync(fd: int) -> None:
        with contextlib.suppress(OSError):
            real(fd)

    os.fsync = fsync
    try:
        yield
    finally:
        os.fsync = real


@contextlib.contextmanager
def lazy_removal() -> Iterator[None]:
    """A planted bug: files of a failed publish in staging are never removed."""
    real = shutil.rmtree
    shutil.rmtree = lambda *_, **__: None  # type: ignore[assignment]
    try:
        yield
    finally:
        shutil.rmtree = real


PLANTED = {
    "a failed fsync is taken for a good one": deaf_fsync,
    "nothing is ever removed from staging": lazy_removal,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("--planted", choices=sorted(PLANTED))
    given = parser.parse_args()
    with PLANTED[given.planted]() if given.planted else contextlib.nullcontext():
        Player(given.data, given.adapters).play()


if __name__ == "__main__":
    main()
