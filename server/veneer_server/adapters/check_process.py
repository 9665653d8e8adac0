"""A process that checks uploaded adapters for the front process, at low priority.

A thread of the front would sometimes hold the GIL, and at low priority it might get no CPU time
to release it: the event loop, and every stream, would then wait. The process answers each
`CheckFiles` with a `Checked`, both as frames on a socket (`wire.frames`).
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import Final

import msgspec
from veneer_registry.adapter import BaseClaim, BaseSpec
from veneer_registry.causes import cause_of
from veneer_registry.disk import disk_errors
from veneer_registry.errors import InternalError, ResourceExhausted, VeneerError
from veneer_registry.format import read_upload
from veneer_registry.manifest_json import manifest_to_json

from veneer_server.adapters.failure import Failure
from veneer_server.system.priority import lower_priority
from veneer_server.wire.frames import framed, read_frame

_NO_MEMORY: Final = "not enough memory to check the adapter; free memory, and push it again"


class CheckFiles(msgspec.Struct, frozen=True, array_like=True):
    """A request to check the files in ``folder`` with `read_upload`."""

    folder: str
    base: BaseSpec | None
    claim: BaseClaim


class Checked(msgspec.Struct, frozen=True, array_like=True):
    """The answer: the adapter's manifest, as `manifest_to_json` writes it, or an error."""

    manifest: str
    failure: Failure | None = None


def _check(wanted: CheckFiles) -> Checked:
    folder = Path(wanted.folder)
    try:
        with disk_errors(folder):
            return Checked(manifest_to_json(read_upload(folder, wanted.base, wanted.claim)))
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
        checked = _check(msgspec.msgpack.decode(body, type=CheckFiles))
        try:
            connection.sendall(framed(msgspec.msgpack.encode(checked)))
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
