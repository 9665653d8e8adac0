"""The server's certificate, which is read again whenever its files have changed; and clients'
certificates.

Open connections keep their certificate; each new connection gets the newest. If the files do
not match, as in the middle of a renewal, the last pair stays in use.
"""

from __future__ import annotations

import asyncio
import math
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

from veneer_registry.errors import InvalidField

from veneer_server.logs import get_logger

_LOOK_NS: Final = 100_000_000
"""Least time between two looks at the files."""
_MOST_BYTES: Final = 1 << 20

_log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Pair:
    """One version of the files, in PEM.

    Attributes:
        chain: the certificate, followed by intermediate certificates.
        client_ca: authorities, one of which must have issued a client's certificate; None if
            clients need no certificate.
    """

    chain: bytes
    key: bytes
    client_ca: bytes | None


class Certificates:
    """The newest usable version of the certificate files. Any thread may use it: gRPC calls it
    from threads of its own."""

    def __init__(self, cert: Path, key: Path, client_ca: Path | None = None) -> None:
        """Raises InvalidField if the files cannot be used."""
        self._files = (cert, key, client_ca)
        self._looked_ns = time.monotonic_ns()
        self._stamps = self._look()
        self._pair, self._context = self._load()
        self._context.sni_callback = self._begin
        self.http_context = self._context
        """TLS context for `asyncio` servers; new connections get the newest certificate."""

    @property
    def current(self) -> Pair:
        """The newest pair that can be used."""
        now = time.monotonic_ns()
        if now - self._looked_ns < _LOOK_NS:
            return self._pair
        self._looked_ns = now
        stamps = self._look()
        if stamps != self._stamps:
            self._stamps = stamps
            try:
                self._pair, context = self._load()
            except InvalidField as error:
                _log.warning(
                    "certificate files rejected, keeping the previous ones", why=str(error)
                )
                self._stamps = ()  # look again soon: the other file may follow
            else:
                context.sni_callback = self._begin
                self._context = context
                _log.info("certificate loaded")
        return self._pair

    def _begin(
        self, connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, _: object
    ) -> None:
        """Called when a client begins a connection: gives it the newest certificate."""
        _ = self.current
        connection.context = self._context

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        stamps: list[tuple[int, int, int] | None] = []
        for file in self._files:
            try:
                found = None if file is None else file.stat()
            except OSError:
                found = None
            stamps.append(found and (found.st_ino, found.st_size, found.st_mtime_ns))
        return tuple(stamps)

    def _load(self) -> tuple[Pair, ssl.SSLContext]:
        cert, key, client_ca = self._files
        pair = Pair(_read(cert), _read(key), None if client_ca is None else _read(client_ca))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        try:
            # Also checks that both belong together. The password callback keeps an encrypted
            # key from prompting on a terminal.
            context.load_cert_chain(cert, key, password=lambda: b"")
        except (ssl.SSLError, OSError, ValueError) as error:
            raise InvalidField(
                f"--tls-cert {cert} and --tls-key {key} cannot be used ({error}): give a PEM "
                "certificate and its own key, without a password",
                metadata={"key": "tls_cert", "file": str(cert)},
            ) from error
        if pair.client_ca is not None:
            try:
                context.load_verify_locations(cadata=pair.client_ca.decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise InvalidField(
                    f"--tls-client-ca {client_ca} cannot be used ({error}): give certificates "
                    "in PEM",
                    metadata={"key": "tls_client_ca", "file": str(client_ca)},
                ) from error
            context.verify_mode = ssl.CERT_REQUIRED
        return pair, context


class ShownCertificate(NamedTuple):
    """A client's certificate, which TLS verified when the client connected.

    Attributes:
        names: subject alternative names; empty if the client showed no certificate.
        until: when it expires, in Unix seconds.
    """

    names: tuple[str, ...] = ()
    until: float = math.inf


NOT_SHOWN: Final = ShownCertificate()


def shown(transport: asyncio.BaseTransport) -> ShownCertificate:
    """Return the client's certificate of a connection."""
    connection = transport.get_extra_info("ssl_object")
    found = (None if connection is None else connection.getpeercert()) or {}
    names = tuple(name for _, name in found.get("subjectAltName", ()))
    if not names:
        return NOT_SHOWN
    return ShownCertificate(names, float(ssl.cert_time_to_seconds(found["notAfter"])))


def shown_to_grpc(context: Mapping[str, Sequence[bytes]]) -> ShownCertificate:
    """Return the client's certificate from the authentication context of a gRPC call."""
    names = tuple(context.get("x509_subject_alternative_name", ()))
    return _in_pem(names, context["x509_pem_cert"][0]) if names else NOT_SHOWN


@lru_cache(1024)
def _in_pem(names: tuple[bytes, ...], pem: bytes) -> ShownCertificate:
    # Imported here, since importing it would slow down every start of the server.
    from cryptography.x509 import load_pem_x509_certificate

    until = load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
    return ShownCertificate(tuple(name.decode("utf-8", "replace") for name in names), until)


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        raise InvalidField(
            f"{file} cannot be read: {error.strerror or error}", metadata={"file": str(file)}
        ) from error
    if len(data) > _MOST_BYTES:
        raise InvalidField(f"{file} is too large for PEM", metadata={"file": str(file)})
    return data
