"""``python -m tests.fakes.s3_server``: moto's S3 on a free port, which it prints; it ends when
its standard input does.

POST to ``/_faults`` sets what goes wrong from then on (JSON)::

    methods   which requests, such as ["PUT"]; default all
    skip      how many of them are answered normally first
    count     how many fail; default all that follow
    kind      "refuse" (503), "error" (500), "cut" (takes the bytes and closes), "lose" (does
              what is asked and closes), "hang" (closes after `seconds`), "slow" (answers after
              `seconds`), "rot" (flips a bit of each read)
    key       only requests whose path contains this

Multipart uploads are listed `UPLOADS_A_PAGE` at a time, as S3 lists them a thousand at a time;
moto lists all at once.
"""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable
from typing import Any, Final

from moto.s3.responses import S3Response
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

UPLOADS_A_PAGE: Final = 2
_XML: Final = "{http://s3.amazonaws.com/doc/2006-03-01/}"

_all_uploads = S3Response.list_multipart_uploads


def _uploads(self: S3Response) -> Any:
    """A page of `ListMultipartUploads`: what follows the markers of the request."""
    status, headers, body = _all_uploads(self)
    root = ET.fromstring(body)
    names = ("Key", "UploadId")
    after = tuple(self.querystring.get(f"{n}-marker", [""])[0] for n in ("key", "upload-id"))
    found = {
        tuple(each.findtext(_XML + name, "") for name in names): each
        for each in root.findall(f"{_XML}Upload")
    }
    following = sorted(marks for marks in found if marks > after)
    page, rest = following[:UPLOADS_A_PAGE], following[UPLOADS_A_PAGE:]
    for marks in found.keys() - set(page):
        root.remove(found[marks])
    if rest:
        for name, mark in zip(names, page[-1], strict=True):
            ET.SubElement(root, f"{_XML}Next{name}Marker").text = mark
        root.find(f"{_XML}IsTruncated").text = "true"  # type: ignore[union-attr]
    return status, headers, ET.tostring(root, encoding="unicode")


class Faulty:
    """Passes requests on, or not."""

    def __init__(self, app: Wsgi) -> None:
        self._app = app
        self._lock = threading.Lock()
        self._faults: dict[str, Any] = {}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_faults":
            size = int(environ.get("CONTENT_LENGTH") or 0)
            with self._lock:
                self._faults = json.loads(environ["wsgi.input"].read(size) or b"{}")
            start("200 OK", [])
            return [b""]
        kind = self._fault(environ)
        if kind in ("refuse", "error", "cut", "hang"):
            size = int(environ.get("CONTENT_LENGTH") or 0)
            environ["wsgi.input"].read(size // 2 if kind == "cut" else size)
            if kind == "hang":
                time.sleep(self._faults.get("seconds", 1.0))
            if kind == "refuse":
                start("503 Slow Down", [("Content-Type", "application/xml")])
                return [b"<Error><Code>SlowDown</Code></Error>"]
            if kind == "error":
                start("500 Internal Server Error", [("Content-Type", "application/xml")])
                return [b"<Error><Code>InternalError</Code></Error>"]
            raise _closed(environ)
        if kind == "slow":
            time.sleep(self._faults.get("seconds", 1.0))
        answer = self._app(environ, start)
        if kind == "lose":
            list(answer)
            raise _closed(environ)
        if kind == "rot":
            return [bytes([each[0] ^ 1]) + each[1:] if each else each for each in answer]
        return answer

    def _fault(self, environ: dict[str, Any]) -> str | None:
        with self._lock:
            faults = self._faults
            if not faults or environ["REQUEST_METHOD"] not in faults.get(
                "methods", [environ["REQUEST_METHOD"]]
            ):
                return None
            if faults.get("key", "") not in environ["PATH_INFO"]:
                return None
            if faults.get("skip", 0) > 0:
                faults["skip"] -= 1
                return None
            if "count" in faults:
                if faults["count"] <= 0:
                    return None
                faults["count"] -= 1
            return str(faults["kind"])


def _closed(environ: dict[str, Any]) -> ConnectionError:
    """Close the connection, which the server would keep for the next request."""
    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
    return ConnectionError("closed")


class Quiet(WSGIRequestHandler):
    """Logs nothing."""

    def log(self, type: str, message: str, *args: Any) -> None:
        """Nothing."""


def main() -> None:
    """Serve until standard input ends."""
    logging.disable(logging.CRITICAL)
    S3Response.list_multipart_uploads = _uploads  # type: ignore[method-assign]
    app = Faulty(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.server_port, flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()


if __name__ == "__main__":
    main()
