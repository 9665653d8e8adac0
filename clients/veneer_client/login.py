"""Finds a client's server address and credentials: arguments, variables, profiles.

A profile is a table of ``profiles.toml`` in the user's configuration folder, which ``veneer
login`` writes. Its key is sent to its own server only.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import grpc
from veneer_registry.errors import InvalidField

from veneer_client.address import is_plain, is_tls, server_address

__all__ = ["DEFAULT_PROFILE", "Login", "find_login", "forget_profile", "save_profile"]

DEFAULT_PROFILE: Final = "default"
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")
_TENANT: Final = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
_FIELDS: Final = ("server", "api_key", "ca", "cert", "key")
_MOST_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Login:
    """What is needed to open a channel and to make calls.

    Attributes:
        address: ``HOST:PORT``.
        credentials: the channel's credentials; None for plain text.
        metadata: sent with every call.
    """

    address: str
    credentials: grpc.ChannelCredentials | None = None
    metadata: tuple[tuple[str, str], ...] = field(default=(), repr=False)


def find_login(
    address: str | None = None,
    *,
    api_key: str | None = None,
    ca: str | os.PathLike[str] | None = None,
    cert: str | os.PathLike[str] | None = None,
    key: str | os.PathLike[str] | None = None,
    tenant: str | None = None,
) -> Login:
    """Find the address and credentials to use.

    An argument that is not given comes from VENEER_SERVER, VENEER_API_KEY, VENEER_CA,
    VENEER_CERT, VENEER_KEY or VENEER_TENANT, then (except the tenant) from the profile that
    VENEER_PROFILE names, or the one named ``default``.

    Args:
        address: ``HOST:PORT``; ``https://HOST:PORT`` for TLS, ``http://HOST:PORT`` for none.
        ca: PEM file with the trusted CA certificates; default: the system's. Giving one turns
            TLS on for ``HOST:PORT``.
        cert, key: PEM files of the client's own certificate (mTLS).
        tenant: the tenant in which an operator acts, instead of the operator's own.

    Raises:
        InvalidField: an address, file or profile cannot be used.
    """
    given = address or os.environ.get("VENEER_SERVER")
    profile = _profile(given)
    where = given or profile.get("server")
    files = {
        name: value or os.environ.get(f"VENEER_{name.upper()}") or profile.get(name)
        for name, value in (("ca", ca), ("cert", cert), ("key", key))
    }
    secret = (api_key or os.environ.get("VENEER_API_KEY") or profile.get("api_key", "")).strip()
    if not secret.isascii() or not (secret or "x").isprintable():
        raise InvalidField(
            "the API key contains invalid characters: copy it again",
            metadata={"field": "api_key"},
        )
    metadata = [("authorization", f"Bearer {secret}")] if secret else []
    if named := (tenant or os.environ.get("VENEER_TENANT", "")).strip():
        if not _TENANT.fullmatch(named):
            raise InvalidField(
                f"{named[:80]!r} is not a tenant's name: use 1 to 63 lower-case letters, "
                "digits, '.', '_' or '-', with a letter or digit at both ends",
                metadata={"field": "tenant"},
            )
        metadata.append(("veneer-tenant", named))
    return Login(server_address(where), _credentials(where, files), tuple(metadata))


def _credentials(
    where: str | None, files: Mapping[str, str | os.PathLike[str] | None]
) -> grpc.ChannelCredentials | None:
    if (files["cert"] is None) != (files["key"] is None):
        raise InvalidField(
            "a client certificate needs its key and a key its certificate: give both (--cert, "
            "--key)",
            metadata={"field": "cert"},
        )
    if is_plain(where) or not (is_tls(where) or any(files.values())):
        return None
    ca, cert, key = (_pem(name, files[name]) for name in ("ca", "cert", "key"))
    return grpc.ssl_channel_credentials(ca, key, cert)


def _pem(name: str, path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(_MOST_BYTES)
    except OSError as error:
        raise InvalidField(
            f"--{name} {os.fspath(path)} cannot be read: {error.strerror or error}",
            metadata={"field": name},
        ) from error
    if b"-----BEGIN " not in data:
        raise InvalidField(
            f"--{name} {os.fspath(path)} is not a PEM file", metadata={"field": name}
        )
    return data


# ------------------------------------------------------------------------------ profiles


def _file() -> Path:
    folder = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(folder).expanduser() / "veneer" / "profiles.toml"


def _profile(given: str | None) -> Mapping[str, str]:
    """The profile to use; empty if there is none, or if it is for another server."""
    named = os.environ.get("VENEER_PROFILE")
    found = _profiles().get(named or DEFAULT_PROFILE)
    if found is None:
        if named:
            raise InvalidField(
                f"there is no profile {named!r}: `veneer login --profile {named}` creates it",
                metadata={"field": "profile"},
            )
        return {}
    if given and server_address(given) != server_address(found.get("server")):
        return {}  # its key is for its own server
    return found


def _profiles() -> dict[str, dict[str, str]]:
    file = _file()
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unusable(file, str(error)) from error
    found = document.get("profiles", {})
    if not isinstance(found, dict) or not all(_is_profile(each) for each in found.values()):
        raise _unusable(file, "it must hold tables [profiles.NAME]")
    return found


def _is_profile(found: Any) -> bool:
    return isinstance(found, dict) and all(
        name in _FIELDS and isinstance(value, str) for name, value in found.items()
    )


def save_profile(name: str, profile: Mapping[str, str]) -> Path:
    """Write a profile, readable by this user alone; returns the file.

    Raises:
        InvalidField: the name or the existing file cannot be used.
    """
    _check_name(name)
    kept = {field: value for field, value in profile.items() if value}
    return _write({**_profiles(), name: kept})


def forget_profile(name: str) -> bool:
    """Remove a profile; False if there is none."""
    _check_name(name)
    profiles = _profiles()
    if profiles.pop(name, None) is None:
        return False
    _write(profiles)
    return True


def _write(profiles: Mapping[str, Mapping[str, str]]) -> Path:
    file = _file()
    lines = ["# Written by `veneer login`. It holds secrets."]
    for name, profile in profiles.items():
        lines += ["", f"[profiles.{name}]"]
        # A JSON string without escaped slashes is a TOML string.
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in profile.items()
        ]
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w", encoding="utf-8") as opened:
        opened.write("\n".join([*lines, ""]))
    draft.replace(file)
    return file


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidField(
            f"a profile cannot be named {name!r}: use letters, digits, '-' and '_'",
            metadata={"field": "profile"},
        )


def _unusable(file: Path, why: str) -> InvalidField:
    return InvalidField(
        f"the profiles in {file} cannot be used: {why}", metadata={"field": "profile"}
    )
