"""Measure how long changes take while the object store is slow:
``python -m tests.bench.slow_store``.

Two registries on one real PostgreSQL and one object store (FAKE: `tests.fakes.s3_server`) that
takes ``--seconds`` for each request. One pushes new adapters, replaces and deletes them; the
other changes labels without pause. Prints seconds: each push, and the longest label change
meanwhile.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from pathlib import Path

from veneer_registry.registry import Registry

from tests.shared_services import running
from tests.unit.registry.kit import BASE, make_adapter, push


def measure(seconds: float, pushes: int) -> None:
    """Measure and print."""
    with running() as services, tempfile.TemporaryDirectory(prefix="veneer-slow-") as work:
        folder = Path(work)
        places = [services.places("own", folder / each) for each in "ab"]
        with (
            Registry.open(folder / "a", BASE, places=places[0]) as pushing,
            Registry.open(folder / "b", BASE, places=places[1]) as labelling,
        ):
            push(labelling, "other", make_adapter(folder / "other", seed=9))
            services.s3.fail(kind="slow", seconds=seconds)
            longest, count, done = 0.0, 0, threading.Event()

            def label() -> None:
                nonlocal longest, count
                while not done.is_set():
                    began = time.monotonic()
                    labelling.update("other", labels={"n": str(count)})
                    longest, count = max(longest, time.monotonic() - began), count + 1

            thread = threading.Thread(target=label)
            thread.start()
            for seed in range(pushes):
                began = time.monotonic()
                adapter = make_adapter(folder / str(seed), seed=seed)
                push(pushing, "chat", adapter, allow_replace=True)
                print(f"push    {time.monotonic() - began:6.2f} s")
            began = time.monotonic()
            pushing.delete("chat")
            pushing.sweep()
            print(f"delete  {time.monotonic() - began:6.2f} s")
            done.set()
            thread.join()
            print(f"longest of {count} label changes at the other registry {longest:.2f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.slow_store", description=__doc__
    )
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--pushes", type=int, default=3)
    given = parser.parse_args()
    measure(given.seconds, given.pushes)
