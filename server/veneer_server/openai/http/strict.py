"""HTTP/1.1 without ambiguity: h11, minus what it tolerates.

If a proxy and this server parse a message differently, a caller can hide a request in
another's (request smuggling). So anything that senders must not send is refused and the
connection closed, even where a recipient may repair it: both Content-Length and
Transfer-Encoding, line breaks without a carriage return, folded headers, versions other than
1.0 and 1.1. h11 itself refuses conflicting lengths, codings other than chunked, bad chunk
sizes, spaces before a colon, and more than one Host header. For the same reason a header that
says who calls, or how the body is to be read, may be there only once.
"""

from __future__ import annotations

import re
from typing import Any, Final

import h11

from veneer_server.access.authenticate import ONCE

MAX_HEAD: Final = 16 << 10
"""Most bytes of a request line and its headers."""

MAX_HEADERS: Final = 200
"""Most lines of a head. Each takes h11 some microseconds."""

MAX_SMALL_CHUNKS: Final = 128
"""Chunks of a body that are allowed on top of one per `CHUNK_BYTES`: each takes h11 some
microseconds, during which every stream stalls."""

CHUNK_BYTES: Final = 256

_BARE: Final = re.compile(rb"(?<!\r)\n|\r(?!\n)|\n[ \t]")
_END: Final = re.compile(rb"\n\r?\n")
_NAME: Final = re.compile(rb"\n([^:\r\n]+):")
_LENGTH: Final = re.compile(rb"\ncontent-length:[^\r\n]*,", re.IGNORECASE)

_FRAMING: Final = ("content-type", "content-length", "transfer-encoding", "host")
_ONCE: Final = frozenset(name.encode() for name in (*ONCE, *_FRAMING))
_ONE_VALUE: Final = (b"content-type", b"host")
"""Headers whose value has no comma: some proxies join the values of repeated headers by one."""


class StrictConnection(h11.Connection):
    """The server's side of one connection.

    Attributes:
        refusal: why the last message was refused; None if it was not.
    """

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD)
        self.refusal: h11.RemoteProtocolError | None = None
        self._chunked = False
        self._chunks = 0
        self._body = 0

    def next_event(self) -> Any:
        """As in h11.

        Raises:
            RemoteProtocolError: the message is refused; close the connection.
        """
        if self.refusal is not None:
            raise self.refusal
        try:
            if self.their_state is h11.IDLE:
                _check_head(self.trailing_data[0])
            before = self.trailing_data[0] if self._chunked else b""
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_request(event)
                self._chunks = self._body = 0
                self._chunked = any(name == b"transfer-encoding" for name, _ in event.headers)
            elif isinstance(event, h11.EndOfMessage) and self._chunked:
                self._chunked = False
                _check_lines(before.removesuffix(self.trailing_data[0]))
            elif isinstance(event, h11.Data):
                self._check_chunk(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event

    def _check_chunk(self, event: h11.Data) -> None:
        self._body += len(event.data)
        self._chunks += event.chunk_start
        if self._chunks > MAX_SMALL_CHUNKS + self._body // CHUNK_BYTES:
            raise h11.RemoteProtocolError(
                f"the body has chunks of fewer than {CHUNK_BYTES} bytes: send larger ones"
            )


def _check_head(waiting: bytes) -> None:
    """Check the part of a request line and headers that has arrived, before h11 parses it."""
    end = _END.search(waiting)
    # The line feed after a final carriage return may not have arrived yet.
    head = waiting[: end.end()] if end is not None else waiting.removesuffix(b"\r")
    # h11 limits only incomplete heads: it parses a complete one of any size.
    if len(head) > MAX_HEAD or head.count(b"\n") > MAX_HEADERS:
        raise h11.RemoteProtocolError(
            f"the headers have more than {MAX_HEAD} bytes or {MAX_HEADERS} lines: send less",
            error_status_hint=431,
        )
    _check_lines(head)
    if end is not None:
        _check_once(head)


def _check_once(head: bytes) -> None:
    """Check that no header of `_ONCE` is repeated. h11 takes several equal lengths for one."""
    names = [name.lower() for name in _NAME.findall(head)]
    twice = len(set(names)) < len(names)
    if twice and (more := next((each for each in _ONCE if names.count(each) > 1), None)):
        raise _repeated(more)
    if _LENGTH.search(head):
        raise _repeated(b"content-length")


def _repeated(name: bytes) -> h11.RemoteProtocolError:
    return h11.RemoteProtocolError(
        f"{name.decode()} is sent more than once, or has more than one value: send it once, "
        "and check that no proxy adds another"
    )


def _check_lines(lines: bytes) -> None:
    if _BARE.search(lines):
        raise h11.RemoteProtocolError(
            "a line of the request ends in LF alone, holds a CR, or is folded: end each line "
            "in CRLF, and put each header on one line"
        )


def _check_request(request: h11.Request) -> None:
    names = {name for name, _ in request.headers}
    for name, value in request.headers:
        if name in _ONE_VALUE and b"," in value:
            raise _repeated(name)
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError(
            "the HTTP version is neither 1.0 nor 1.1: use one of them",
            error_status_hint=505,
        )
    if b"transfer-encoding" in names:
        if b"content-length" in names:
            raise h11.RemoteProtocolError(
                "the request has both Content-Length and Transfer-Encoding: send one of them"
            )
        if request.http_version == b"1.0":
            raise h11.RemoteProtocolError(
                "HTTP/1.0 does not support Transfer-Encoding: send Content-Length, or use "
                "HTTP/1.1"
            )
