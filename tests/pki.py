"""Certificates of our own authority, as files, for tests of TLS."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import trustme


@dataclass
class Pki:
    """Certificates of one authority, as files."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.ca.cert_pem.write_to_path(self.ca_file)
        self.renew()

    @property
    def ca_file(self) -> str:
        return str(self.folder / "ca.pem")

    @property
    def cert(self) -> str:
        return str(self.folder / "cert.pem")

    @property
    def key(self) -> str:
        return str(self.folder / "key.pem")

    def renew(self, name: str = "localhost") -> None:
        """Issue a new certificate for the server; replace its two files one after the other."""
        made = self.ca.issue_cert(name, "127.0.0.1")
        for path, blobs in (
            (Path(self.key), [made.private_key_pem]),
            (Path(self.cert), made.cert_chain_pems),
        ):
            draft = path.with_suffix(".new")
            draft.write_bytes(b"".join(blob.bytes() for blob in blobs))
            draft.replace(path)

    def client(self, name: str) -> tuple[str, str]:
        """Issue a client certificate; return the files of the certificate and its key."""
        made = self.ca.issue_cert(name)
        cert, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        cert.write_bytes(b"".join(blob.bytes() for blob in made.cert_chain_pems))
        key.write_bytes(made.private_key_pem.bytes())
        return str(cert), str(key)
