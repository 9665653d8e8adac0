"""A process that checks uploaded adapters for the front process, at low priority.

A thread of the front would hold the GIL now and then, and at low priority it may get no CPU
time to release it: then the event loop, and every stream, waits. Answers a `Check` with a
`Checked`, both as frames on a socket (`wire.frames`).
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.adapter import BaseSpec
from veneer_registry.causes import cause_of
from veneer_registry.disk import disk_errors
from veneer_registry.errors import InternalError, ResourceExhausted, VeneerError
from veneer_registry.format import read_adapter
from veneer_registry.manifest_json import manifest_to_json

from veneer_server.adapters.failure import Failure
from veneer_server.system.priority import lower_priority
from veneer_server.wire.frames import framed, read_frame

__all__ = ["Check", "Checked", "main"]

_NO_MEMORY: Final = "not enough memory to check the adapter; free memory, and push it again"


class Check(msgspec.Struct, frozen=True, array_like=True):
    """Check the files in ``folder`` as `read_adapter` does."""

    folder: str
    base: BaseSpec | None


class Checked(msgspec.Struct, frozen=True, array_like=True):
    """The adapter's manifest, as `manifest_to_json` writes it, or why it is refused."""

    manifest: str
    failure: Failure | None = None


def _check(wanted: Check) -> Checked:
    folder = Path(wanted.folder)
    try:
        with disk_errors(folder):
            return Checked(manifest_to_json(read_adapter(folder, wanted.base)))
    except VeneerError as error:
        return Checked("", Failure.of(error))
    except MemoryError:
        return Checked("", Failure.of(ResourceExhausted(_NO_MEMORY, retry_after_s=5.0)))
    except Exception as error:
        why = f"the adapter could not be checked ({type(error).__name__}: {cause_of(error)})"
        return Checked("", Failure.of(InternalError(f"{why}; please report this")))


def main() -> None:
    """Serve checks until the front process ends."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    connection = socket.socket(fileno=int(sys.argv[1]))
    while (body := read_frame(connection)) is not None:
        checked = _check(msgspec.msgpack.decode(body, type=Check))
        try:
            connection.sendall(framed(msgspec.msgpack.encode(checked)))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
