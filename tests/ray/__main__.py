"""Starts a registry and two engines under Ray Serve here, with the real base, beside another
team's application, and checks what users rely on: ``python -m tests.ray``, some minutes. It
needs the extra ``ray``.

With ``--running GRPC HTTP DATA_DIR ADDRESS`` it checks a deployment that is there, with two
engines, and leaves it there; ``--only NAME`` runs some checks; ``--base FOLDER`` takes another
base.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from tests.ray.checks import CHECKS, NEED_NEIGHBOUR, Seen
from tests.ray.deployed import Deployed, deployed

FLAGS = ("--device", "cpu", "--threads", "1", "--kv-cache-bytes", "256MiB")


async def check(found: Deployed, only: list[str]) -> int:
    """Run the checks one after another; returns the number that failed."""
    server, seen, failed = found.server(), Seen(), 0
    for each in CHECKS:
        if only and each.__name__ not in only:
            continue
        if found.other is None and each in NEED_NEIGHBOUR:
            print(f"{each.__name__:12} skipped: it needs a deployment of its own")
            continue
        began = time.monotonic()
        try:
            said = await each(found, server, seen)
        except Exception as error:  # any failure is a result
            failed += 1
            while isinstance(error, ExceptionGroup):  # of the tasks that were under way
                error = error.exceptions[0]
            said = f"FAILED: {type(error).__name__}: {error}"
        print(f"{each.__name__:12} {time.monotonic() - began:6.1f} s  {said}", flush=True)
    await server.channel.close()
    return failed


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--base", default="")
    parser.add_argument("--running", nargs=4, metavar=("GRPC", "HTTP", "DATA_DIR", "ADDRESS"))
    given = parser.parse_args()
    load = os.getloadavg()[0]
    print(f"tests.ray: {os.cpu_count()} CPUs, load {load:.1f} before it starts")
    with ExitStack() as stack:
        if given.running:
            grpc, http, data_dir, address = given.running
            found = Deployed(grpc, http, Path(data_dir), address, dict(os.environ))
        else:
            base = ("--base", given.base) if given.base else ()
            found = stack.enter_context(deployed((*FLAGS, *base)))
        failed = asyncio.run(check(found, given.only))
    print(f"{failed} failed" if failed else "all well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
