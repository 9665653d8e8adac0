"""The simplest program that owns a data folder, for row 8.

``python -m tests.torture.owners DATA`` prints ``ready``, reads a CLOCK_MONOTONIC time from its
input, tries to lock the folder at that time, prints one JSON line, and keeps the lock until
its input ends.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from veneer_registry.errors import StoreLocked
from veneer_registry.lock import OwnerLock


@contextlib.contextmanager
def shared_lock() -> Iterator[None]:
    """A planted bug: the lock is taken as a shared one."""
    real = fcntl.flock
    fcntl.flock = lambda fd, _: real(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    try:
        yield
    finally:
        fcntl.flock = real


@contextlib.contextmanager
def lock_by_file() -> Iterator[None]:
    """A planted bug: a process owns the folder by creating a file, which stays if it is
    killed."""
    real = fcntl.flock

    def flock(fd: int, _: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}")).with_name("OWNED")
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))

    fcntl.flock = flock
    try:
        yield
    finally:
        fcntl.flock = real


PLANTED = {
    "the lock is a shared one": shared_lock,
    "the lock is a file that a killed owner leaves": lock_by_file,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--planted", choices=sorted(PLANTED))
    given = parser.parse_args()
    print("ready", flush=True)
    moment = float(sys.stdin.readline() or 0)
    while time.monotonic() < moment:
        pass
    with PLANTED[given.planted]() if given.planted else contextlib.nullcontext():
        try:
            lock = OwnerLock(given.data)
        except StoreLocked as error:
            said = {"owner": False, "pid": error.metadata["pid"], "message": str(error)}
            print(json.dumps(said), flush=True)
            return
    print(json.dumps({"owner": True, "pid": str(os.getpid())}), flush=True)
    sys.stdin.read()
    lock.release()


if __name__ == "__main__":
    main()
