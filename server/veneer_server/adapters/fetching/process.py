"""The process that fetches one adapter into a staging folder.

It receives a `Fetch` and answers with a `Fetched`, both as frames on a socket (`wire.frames`),
and ends. It also ends when the other side closes the socket.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

import msgspec
from veneer_registry.bundle_files import ALLOWED_FILES, REQUIRED_FILES
from veneer_registry.causes import cause_of
from veneer_registry.errors import (
    Aborted,
    AdapterInvalid,
    InternalError,
    ResourceExhausted,
    VeneerError,
)

from veneer_server.adapters.failure import Failure
from veneer_server.adapters.fetching.allowed import AllowList
from veneer_server.adapters.fetching.places import HubFolder, SourceFolder, WebFolder
from veneer_server.adapters.fetching.sandbox import confine, limit
from veneer_server.adapters.fetching.uris import parse_uri
from veneer_server.adapters.fetching.web import Missing
from veneer_server.system.priority import lower_priority
from veneer_server.wire.frames import framed, read_frame

_PICKLE: Final = "adapter_model.bin"


class Fetch(msgspec.Struct, frozen=True, array_like=True):
    """A request to fetch the adapter of ``uri`` into the empty ``folder``.

    Attributes:
        allowed: the entries of the allow-list.
        tokens: tokens, by the URI prefix that each is for.
        hub: the hub's URL.
        most_bytes: most bytes of the weights; other files have their own limits.
        deadline_s: seconds that the whole fetch may take.
        least_rate: minimum bytes a second.
    """

    uri: str
    folder: str
    allowed: tuple[str, ...]
    tokens: dict[str, str]
    hub: str
    most_bytes: int
    deadline_s: float
    least_rate: int


class Fetched(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a `Fetch`.

    Attributes:
        files: names of the fetched files.
        confined: whether the kernel confined the process to its folder.
        failure: why the fetch failed, or None.
    """

    files: tuple[str, ...]
    confined: bool
    failure: Failure | None = None


class _Late(BaseException):
    """The deadline has passed. Not an Exception, since libraries catch those."""


def fetch(wanted: Fetch) -> tuple[str, ...]:
    """Fetch the files that an adapter bundle may have; return their names.

    Raises:
        VeneerError: the adapter cannot be fetched.
    """
    source, folder, found = _source(wanted), Path(wanted.folder), []
    for file, bound in ALLOWED_FILES.items():
        path = folder / file
        try:
            with path.open("xb") as into:
                source.get(file, into, bound or wanted.most_bytes)
        except (Missing, AdapterInvalid) as error:
            path.unlink(missing_ok=True)
            absent = isinstance(error, Missing) or error.metadata.get("cause") == "access"
            if not absent or (file in REQUIRED_FILES and not isinstance(error, Missing)):
                raise
            if file in REQUIRED_FILES:
                raise _missing(file) from None
        else:
            found.append(file)
    return tuple(found)


def _source(wanted: Fetch) -> SourceFolder:
    uri, allowed = parse_uri(wanted.uri), AllowList(wanted.allowed)
    entry = allowed.check(uri)
    if uri.scheme == "https":
        return WebFolder(uri, allowed, wanted.tokens, wanted.least_rate)
    if uri.scheme == "hf":
        return HubFolder(uri, entry, allowed, wanted.tokens, wanted.least_rate, wanted.hub)
    from veneer_server.adapters.fetching.buckets import BucketFolder

    return BucketFolder(uri, entry.networks)


def _missing(file: str) -> AdapterInvalid:
    return AdapterInvalid(
        f"{file} was not found: give the URI of the folder that PEFT's save_pretrained wrote; "
        f"a {_PICKLE} is a pickle, and never read",
        metadata={"file": file, "cause": "missing"},
    )


def _answer(wanted: Fetch) -> Fetched:
    confined = False
    try:
        limit(
            file_bytes=max(wanted.most_bytes, 1 << 20) + 1,
            cpu_s=int(wanted.deadline_s) + 10,
        )
        confined = confine(Path(wanted.folder), _readable(wanted.uri))
        return Fetched(fetch(wanted), confined)
    except _Late:
        failure: VeneerError = Aborted(
            f"the adapter was not fetched within {wanted.deadline_s:g} s: fetch from a faster "
            "host, or start the server with a larger --fetch-deadline",
            metadata={"field": "uri", "cause": "deadline"},
        )
    except VeneerError as error:
        failure = error
    except MemoryError:
        failure = ResourceExhausted(
            "not enough memory to fetch the adapter: try again", retry_after_s=5.0
        )
    except Exception as error:
        failure = InternalError(
            "the adapter could not be fetched; please report this with the server's log",
            metadata={"field": "uri", "cause": "internal"},
            detail=f"{type(error).__name__}: {cause_of(error)}"[:300],
        )
    return Fetched((), confined, Failure.of(failure))


def _readable(uri: str) -> list[Path]:
    if uri.startswith(("s3://", "gs://")):
        from veneer_server.adapters.fetching.buckets import credential_files

        return credential_files()
    return []


def _end_with(connection: socket.socket) -> None:
    """End this process when the other side closes the socket, even in the middle of a fetch."""
    try:
        connection.recv(1)
    finally:
        os._exit(0)


def _late(number: int, frame: FrameType | None) -> NoReturn:
    raise _Late


def main() -> None:
    """Serve one fetch."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    connection = socket.socket(fileno=int(sys.argv[1]))
    body = read_frame(connection)
    if body is None:
        return
    wanted = msgspec.msgpack.decode(body, type=Fetch)
    signal.signal(signal.SIGALRM, _late)
    signal.setitimer(signal.ITIMER_REAL, wanted.deadline_s)
    answer = msgspec.msgpack.encode(_answer_watched(wanted, connection))
    signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        connection.sendall(framed(answer))
    finally:
        # Exit at once: threads of the libraries may still be waiting.
        os._exit(0)


def _answer_watched(wanted: Fetch, connection: socket.socket) -> Fetched:
    threading.Thread(target=_end_with, args=[connection], daemon=True).start()
    return _answer(wanted)


if __name__ == "__main__":
    main()
