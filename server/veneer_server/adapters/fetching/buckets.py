"""Source folders in object stores (``s3`` and ``gs``), read with fsspec.

Credentials and endpoint come from the environment, which the operator sets. Imported by the
fetching process only.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Final

from veneer_registry.errors import Aborted, AdapterInvalid, Unimplemented

from veneer_server.adapters.fetching.addresses import Network, may_contact
from veneer_server.adapters.fetching.uris import Uri, refuse_uri
from veneer_server.adapters.fetching.web import Missing, too_large

_PIECE: Final = 8 << 20
_FILES: Final = (
    "AWS_SHARED_CREDENTIALS_FILE",
    "AWS_CONFIG_FILE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CA_BUNDLE",
    "GOOGLE_APPLICATION_CREDENTIALS",
)


class BucketFolder:
    """A `SourceFolder` in a bucket."""

    def __init__(self, uri: Uri, networks: Iterable[Network]) -> None:
        """Raises Unimplemented if the packages of the extra ``remote`` are missing."""
        self._refused = _guard(tuple(networks))
        try:
            import fsspec

            self._store: Any = fsspec.filesystem(uri.scheme, **_options(uri))
        except ImportError as error:
            raise Unimplemented(
                f"{uri.scheme}:// needs packages that this server lacks: install them with "
                "pip install '.[remote]' in Veneer's folder",
                metadata={"field": "uri", "cause": "extra"},
                detail=str(error),
            ) from error
        self._uri = uri

    def get(self, file: str, into: IO[bytes], most: int) -> None:
        """See `places.SourceFolder`."""
        path = "/".join([self._uri.place, *self._uri.parts, file])
        try:
            before = self._state(path)
            size = int(before["size"])
            if size > most:
                raise too_large(file, most)
            for at in range(0, size, _PIECE):
                data = self._store.cat_file(path, start=at, end=min(at + _PIECE, size))
                if len(data) != min(_PIECE, size - at):
                    raise OSError("a part has the wrong size")
                into.write(data)
            if self._state(path) != before:
                raise OSError("the object was replaced while it was read")
        except FileNotFoundError:
            raise Missing from None
        except PermissionError as error:
            raise AdapterInvalid(
                f"{file}: the bucket denies access: check the credentials in the server's "
                "environment, and the addresses in --fetch-allow",
                metadata={"file": file, "cause": "access"},
                detail=str(error)[:300],
            ) from error
        except (Aborted, AdapterInvalid, Missing):
            raise
        except Exception as error:  # each library has its own exceptions
            if self._refused:
                refuse_uri(
                    "its bucket's endpoint has an address that this server may not contact: "
                    "the operator can allow its network in the --fetch-allow entry",
                    cause="address",
                    detail=", ".join(sorted(self._refused)),
                )
            if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
                raise AdapterInvalid(
                    f"{file}: the server has no credentials for this bucket: give them in its "
                    "environment, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
                    metadata={"file": file, "cause": "access"},
                ) from error
            raise Aborted(
                f"{file} could not be read from the bucket: check the URI, or try again",
                metadata={"file": file, "cause": "bucket"},
                detail=f"{type(error).__name__}: {str(error)[:300]}",
            ) from error

    def _state(self, path: str) -> dict[str, str]:
        self._store.invalidate_cache()
        found = self._store.info(path)
        if found.get("type") != "file":
            raise FileNotFoundError(path)
        kept = ("size", "ETag", "etag", "LastModified", "mtime", "updated", "generation")
        return {name: str(found[name]) for name in kept if name in found}


def credential_files() -> list[Path]:
    """Return the files and folders that the libraries read credentials from."""
    named = [Path(os.environ[name]) for name in _FILES if os.environ.get(name)]
    home = Path.home()
    return [
        *(path for each in named for path in (each, Path(os.path.realpath(each)).parent)),
        home / ".aws",
        home / ".config" / "gcloud",
    ]


def _options(uri: Uri) -> dict[str, Any]:
    if uri.scheme == "s3":
        return {
            "use_listings_cache": False,
            "config_kwargs": {
                "connect_timeout": 10,
                "read_timeout": 30,
                "retries": {"total_max_attempts": 2},
            },
        }
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    default = Path.home() / ".config" / "gcloud" / "application_default_credentials.json"
    known = bool(named) or default.exists()
    return {"use_listings_cache": False, "token": "google_default" if known else "anon"}


def _guard(networks: tuple[Network, ...]) -> set[str]:
    """Patch `socket` so that this process connects to no address that may not be contacted,
    since the libraries connect by themselves. Return a set to which refused addresses are
    added."""
    refused: set[str] = set()
    before = socket.socket.connect
    before_ex = socket.socket.connect_ex

    def check(connecting: socket.socket, address: Any) -> None:
        if connecting.family in (socket.AF_INET, socket.AF_INET6) and not may_contact(
            str(address[0]), networks
        ):
            refused.add(str(address[0]))
            raise OSError(f"{address[0]} may not be contacted")

    def connect(self: socket.socket, address: Any) -> None:
        check(self, address)
        before(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        check(self, address)
        return before_ex(self, address)

    socket.socket.connect = connect  # type: ignore[method-assign,assignment]
    socket.socket.connect_ex = connect_ex  # type: ignore[method-assign,assignment]
    return refused
