"""Folders, web servers and names to fetch from, and a record of what was touched."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from veneer_server.adapters.fetching import addresses
from veneer_server.adapters.fetching.process import Fetch
from veneer_server.serving.local_folders import LocalFolders

from tests.pki import Pki
from tests.unit.registry.kit import make_adapter
from tests.web_folder import WebFolder, web_folder

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
MARK: Final = b"SECRET-MARK"
TOKEN: Final = "open-sesame"

_WEB, _CDN, _HUB = "models.example.com", "cdn.example.com", "hub.example.com"
_NAMES: Final = {
    _WEB: ["127.0.0.1"],
    _CDN: ["127.0.0.1"],
    _HUB: ["127.0.0.1"],
    "localhost": ["127.0.0.1", "::1"],
    "inside.example.com": ["10.0.0.7"],
    "metadata.example.com": ["169.254.169.254"],
    "mapped.example.com": ["::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe"],
}
_REBINDING: Final = "rebinding.example.com"
"""First it has a public address, then a private one. It is allowed."""
_PUBLIC: Final = "8.8.8.8"


class World:
    """One world.

    Attributes:
        broken: what was touched that must not be, since the last `check`.
    """

    def __init__(self, folder: Path, web: WebFolder, cdn: WebFolder, hub: WebFolder) -> None:
        self.folder, self.web, self.cdn, self.hub = folder, web, cdn, hub
        self.root, self.secret = folder / "root", folder / "secret"
        self.staging = folder / "staging"
        self.broken: list[str] = []
        self.allowed = (
            f"https://{_WEB}:{web.port}/lora/ 127.0.0.0/8",
            f"https://{_CDN}:{cdn.port}/ 127.0.0.0/8",
            "hf://org/ 127.0.0.0/8",
            "https://rebinding.example.com/",
            "https://metadata.example.com/",
            "https://mapped.example.com/",
        )
        self.seeds = (
            f"https://{_WEB}:{web.port}/lora/sql",
            f"https://{_WEB}:{web.port}/lora/team/private",
            f"https://{_CDN}:{cdn.port}/x",
            "hf://org/sql",
            "hf://org/sql@v1/sub",
            f"file://{self.root}/sql",
            f"file://{self.root}/team/code",
            f"file://{self.root}/out",
            "s3://bucket/lora/sql",
        )
        self.local = LocalFolders((self.root,), 1 << 20, "uri")
        self._ports = {web.port, cdn.port, hub.port}
        self._fill()
        self._inodes = {
            (found.st_dev, found.st_ino)
            for path in (self.secret, *self.secret.rglob("*"))
            for found in [path.stat()]
        }
        self._watching = False

    def _fill(self) -> None:
        make_adapter(self.root / "sql", seed=1)
        make_adapter(self.root / "team" / "code", seed=2)
        make_adapter(self.secret, seed=3)
        (self.secret / "README.md").write_bytes(MARK)
        (self.secret / "passwd").write_bytes(MARK)
        (self.root / "out").symlink_to(self.secret)
        (self.root / "up").symlink_to("../secret")
        (self.root / "chain").symlink_to("out")
        (self.root / "loop").symlink_to("loop")
        (self.root / "in").symlink_to("sql")
        for name, target in (
            ("mixed", self.secret / WEIGHTS),
            ("relative", "../../secret/" + WEIGHTS),
        ):
            make_adapter(self.root / name, seed=4)
            (self.root / name / WEIGHTS).unlink()
            (self.root / name / WEIGHTS).symlink_to(target)
        make_adapter(self.root / "fifo", seed=5)
        (self.root / "fifo" / WEIGHTS).unlink()
        os.mkfifo(self.root / "fifo" / WEIGHTS)

    def answer_well(self) -> None:
        """Let the web servers behave."""
        for server in (self.web, self.cdn, self.hub):
            server.answers.clear()
            server.asked.clear()
        sql = self.root / "sql"
        for place in ("/lora/sql", "/lora/team/private", "/else", "/lora"):
            self.web.serve(place, sql)
        self.cdn.serve("/x", sql)
        for place in (
            "/org/sql/resolve/main",
            "/org/sql/resolve/v1/sub",
            "/other/sql/resolve/main",
        ):
            self.hub.serve(place, sql)

    def fetch(self, uri: str) -> Fetch:
        """What the fetching process is asked."""
        return Fetch(
            uri=uri,
            folder=str(self.staging),
            allowed=self.allowed,
            tokens={f"https://{_WEB}:{self.web.port}/lora/team/": TOKEN, "hf://org/": TOKEN},
            hub=f"http://{_HUB}:{self.hub.port}",
            most_bytes=1 << 20,
            deadline_s=30.0,
            least_rate=0,
        )

    def evil(self, random_: random.Random) -> str:
        """A place that a redirect may name."""
        web, cdn, hub = self.web.port, self.cdn.port, self.hub.port
        return random_.choice(
            [
                f"https://{_WEB}:{web}/lora/sql/{WEIGHTS}",
                f"https://{_CDN}:{cdn}/x/{WEIGHTS}?signature=a%2Fb",
                f"https://{_CDN}:{cdn}/x/{WEIGHTS}",
                f"//{_CDN}:{cdn}/x/{WEIGHTS}",
                f"https://{_WEB}:{web}/else/{WEIGHTS}",
                f"https://{_WEB}:{web}/lora/../else/{WEIGHTS}",
                f"https://{_WEB}:{web}/lora/%2e%2e/else/{WEIGHTS}",
                f"https://{_WEB}:{web}/lora%2f..%2felse/{WEIGHTS}",
                f"https://{_WEB}:{web}/lora/..\\else/{WEIGHTS}",
                f"/else/{WEIGHTS}",
                f"../../else/{WEIGHTS}",
                f"http://{_WEB}:{web}/lora/sql/{WEIGHTS}",
                f"http://{_HUB}:{hub}/other/sql/resolve/main/{WEIGHTS}",
                f"https://localhost:{web}/lora/sql/{WEIGHTS}",
                f"https://127.0.0.1:{web}/lora/sql/{WEIGHTS}",
                f"https://127.1:{web}/lora/sql/{WEIGHTS}",
                f"https://2130706433:{web}/lora/sql/{WEIGHTS}",
                f"https://[::1]:{web}/lora/sql/{WEIGHTS}",
                f"https://[::ffff:127.0.0.1]:{web}/lora/sql/{WEIGHTS}",
                f"https://{_WEB}:{web}@evil.example.com/lora/{WEIGHTS}",
                f"https://evil.example.com#@{_WEB}:{web}/lora/{WEIGHTS}",
                f"https://{_WEB}.evil.example.com:{web}/lora/{WEIGHTS}",
                f"https://{_WEB}:1/lora/sql/{WEIGHTS}",
                "http://169.254.169.254/latest/meta-data/",
                "https://169.254.169.254/latest/meta-data/",
                "https://metadata.example.com/latest/",
                "https://mapped.example.com/latest/",
                "https://rebinding.example.com/x",
                "https://inside.example.com/x",
                f"file://{self.secret}/{WEIGHTS}",
                "gopher://localhost/x",
                "",
            ]
        )

    # ----------------------------------------------------------------------- watching

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note what the block touches."""
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """An audit hook: opens of the secret folder, connections to what is not allowed."""
        if not self._watching:
            return
        if event == "socket.connect":
            address = arguments[1]
            if (address[0], address[1]) not in {("127.0.0.1", port) for port in self._ports}:
                if address[0] != _PUBLIC:
                    self.broken.append(f"contacted {address[:2]}")
                raise ConnectionRefusedError(f"not from here: {address}")
        elif event in ("open", "os.listdir", "os.scandir") and isinstance(
            arguments[0], str | int
        ):
            self._watching = False  # what follows is our own
            try:
                self.look_at(arguments[0])
            finally:
                self._watching = True

    def look_at(self, place: str | int) -> None:
        """Note a path or descriptor that is of the secret folder."""
        try:
            found = os.stat(place)
        except (OSError, ValueError):
            return
        if (found.st_dev, found.st_ino) in self._inodes:
            self.broken.append(f"opened {place} ({stat.S_IFMT(found.st_mode):o})")

    def look_at_requests(self) -> None:
        """Note requests for paths that are not allowed, and tokens in wrong places."""
        for asked in self.web.asked:
            inside = asked.path.startswith("/lora/") and "%2" not in asked.path
            if not inside or ".." in asked.path.split("/"):
                self.broken.append(f"asked for {asked.path}")
            if asked.token and not asked.path.startswith("/lora/team/"):
                self.broken.append(f"sent a token for {asked.path}")
        self.broken += [f"sent a token for {a.path}" for a in self.cdn.asked if a.token]
        self.broken += [
            f"asked for {a.path}" for a in self.hub.asked if not a.path.startswith("/org/")
        ]


_asked: list[str] = []


def _resolve(host: str, port: int, **kwargs: Any) -> list[Any]:
    found = _NAMES.get(host)
    if host == _REBINDING:
        _asked.append(host)
        found = [_PUBLIC if len(_asked) % 2 else "127.0.0.1"]
    if found is None:
        try:
            found = [str(ipaddress.ip_address(host))]
        except ValueError:
            try:
                found = [socket.inet_ntoa(socket.inet_aton(host))]
            except (OSError, UnicodeError):
                raise socket.gaierror(f"no {host}") from None
    return [
        (
            socket.AF_INET6 if ":" in text else socket.AF_INET,
            socket.SOCK_STREAM,
            6,
            "",
            (text, port),
        )
        for text in found
    ]


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Make one. Its audit hook stays until this process ends, and then does nothing."""
    with ExitStack() as stack:
        pki = Pki(folder / "pki")
        made = pki.ca.issue_cert(_WEB, _CDN, _HUB, "localhost", "127.0.0.1", "::1")
        Path(pki.key).write_bytes(made.private_key_pem.bytes())
        Path(pki.cert).write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        os.environ["SSL_CERT_FILE"] = pki.ca_file
        web = stack.enter_context(web_folder(pki.cert, pki.key))
        cdn = stack.enter_context(web_folder(pki.cert, pki.key))
        hub = stack.enter_context(web_folder())
        here = World(folder, web, cdn, hub)
        before, addresses.socket.getaddrinfo = addresses.socket.getaddrinfo, _resolve  # type: ignore[assignment]
        stack.callback(setattr, addresses.socket, "getaddrinfo", before)
        sys.addaudithook(here.hook)
        yield here
