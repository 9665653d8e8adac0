"""A web server for adapter folders that can also misbehave, for tests of fetching.

It records each request: its path, host name and token.
"""

from __future__ import annotations

import http.server
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    host: str
    token: str


@dataclass
class Answer:
    """How one path is answered.

    Attributes:
        status: HTTP status.
        length: Content-Length; None: the body's length; -1: no header.
        body: bytes, or a generator of pieces that may never end.
        headers: additional headers.
    """

    body: bytes | Callable[[], Iterator[bytes]] = b""
    status: int = 200
    length: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)


class WebFolder:
    """The server.

    Attributes:
        answers: path -> answer; other paths are 404.
        asked: requests so far.
        port: port on all addresses of ``localhost``.
    """

    def __init__(self, port: int) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[Asked] = []
        self.port = port
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        """The beginning of its https URIs."""
        return f"https://localhost:{self.port}"

    def serve(self, path: str, folder: Path) -> None:
        """Serve the files of a folder below a path."""
        for file in folder.iterdir():
            self.answers[f"{path}/{file.name}"] = Answer(file.read_bytes())

    def paths(self) -> list[str]:
        """Return the requested paths, in order."""
        return [asked.path for asked in self.asked]


def endless(ended: threading.Event, piece: bytes = b"x" * 65536) -> Iterator[bytes]:
    """Yield a body that never ends."""
    while not ended.is_set():
        yield piece


def dripping(ended: threading.Event, every_s: float = 0.05) -> Iterator[bytes]:
    """Yield a body of one byte now and then."""
    while not ended.wait(every_s):
        yield b"x"


@contextmanager
def web_folder(cert: str | None = None, key: str | None = None) -> Iterator[WebFolder]:
    """Run a server; with TLS if there is a certificate."""
    asked_of: list[WebFolder] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            web = asked_of[0]
            host = self.headers.get("host", "")
            web.asked.append(Asked(self.path, host, self.headers.get("authorization", "")))
            answer = web.answers.get(self.path, Answer(status=404))
            self.send_response(answer.status)
            body = answer.body
            own = len(body) if isinstance(body, bytes) else -1
            length = own if answer.length is None else answer.length
            if length >= 0:
                self.send_header("content-length", str(length))
            self.send_header("connection", "close")
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            try:
                for piece in [body] if isinstance(body, bytes) else body():
                    self.wfile.write(piece)
            except OSError:
                pass  # the client has had enough
            self.close_connection = True

        def log_message(self, *args: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *args: object) -> None:
            pass  # a client that leaves in the middle of a handshake

    server = Server(("127.0.0.1", 0), Handler)
    if cert is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        plain_accept = server.socket.accept

        def get_request() -> tuple[socket.socket, object]:
            connection, address = plain_accept()
            connection.settimeout(30)
            return (
                context.wrap_socket(
                    connection, server_side=True, do_handshake_on_connect=False
                ),
                address,
            )

        server.get_request = get_request  # type: ignore[method-assign,assignment]
    web = WebFolder(server.server_address[1])
    asked_of.append(web)
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield web
    finally:
        web.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
