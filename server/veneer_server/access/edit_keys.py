"""Adds and removes keys in a keys file, and keeps its comments. Servers read it again at
once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import tomlkit
from veneer_registry.disk import FILE_MODE, sync
from veneer_registry.errors import InvalidField

from veneer_server.access.keys import ApiKey, Identities, make_key, parse_identities
from veneer_server.access.principal import Role


@dataclass(frozen=True, slots=True)
class NewKey:
    """Attributes:
    key: the key to give to the caller; it is not stored anywhere.
    """

    id: str
    key: str


def add_key(
    path: Path,
    *,
    name: str,
    tenant: str,
    roles: list[Role],
    expires: datetime | None,
    limits: Mapping[str, object] = MappingProxyType({}),
    gateway: bool = False,
) -> NewKey:
    """Make a key and add it to the file, which is created if there is none.

    Args:
        limits: limits by name, as in `quotas.quota.Quota`.

    Raises:
        InvalidField: a value, or the file, is not valid.
    """
    key, id, digest = make_key()
    with _edited(path) as document:
        entry = tomlkit.table()
        entry["name"] = name or id
        entry["tenant"] = tenant
        entry["roles"] = list(roles)
        entry["created"] = datetime.now(UTC).replace(microsecond=0)
        if gateway:
            entry["gateway"] = True
        if expires is not None:
            entry["expires"] = expires.replace(microsecond=0)
        entry["sha256"] = digest
        if limits:
            table = tomlkit.inline_table()
            table.update(limits)
            entry["limits"] = table
        keys = document.setdefault("keys", tomlkit.table(is_super_table=True))
        keys[id] = entry
    return NewKey(id, key)


def revoke_key(path: Path, id: str) -> None:
    """Remove a key.

    Raises:
        InvalidField: there is no such key, or the file is not valid.
    """
    id = id.split("_")[1] if id.count("_") >= 2 else id  # a whole key was given
    with _edited(path) as document:
        keys = document.get("keys", {})
        if id not in keys:
            raise InvalidField(
                f"{path} has no key {id}: list them with `veneer-server key ls`",
                metadata={"field": "id"},
            )
        del keys[id]


def list_keys(path: Path) -> list[ApiKey]:
    """Return the keys of a file, sorted by name. Raises InvalidField."""
    return sorted(_read(path)[1].keys.values(), key=lambda key: (key.principal.name, key.id))


def _read(path: Path) -> tuple[str, Identities]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InvalidField(
            f"the keys file {path} cannot be read: {why}", metadata={"file": str(path)}
        ) from error
    return text, parse_identities(text, path)


@contextmanager
def _edited(path: Path) -> Iterator[tomlkit.TOMLDocument]:
    """Edit the file's document inside the block; the edited document then replaces the file.
    Other programs that edit it through this function wait."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        text = _read(path)[0] if path.exists() else ""
        document = tomlkit.parse(text)
        yield document
        written = tomlkit.dumps(document)
        parse_identities(written, path)  # also checks the new values
        _replace(path, written)
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    before = path.stat() if path.exists() else None
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            file.write(text)
            if before is not None:
                _keep_owner(path, file.fileno(), before)
                os.fchmod(file.fileno(), before.st_mode & 0o777)
        sync(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _keep_owner(path: Path, fd: int, before: os.stat_result) -> None:
    """Give the new file the owner and group of the old one: a server that could not read it
    would keep using the old keys. Raises InvalidField if that is not allowed."""
    if (before.st_uid, before.st_gid) == (os.geteuid(), os.fstat(fd).st_gid):
        return
    try:
        os.fchown(fd, before.st_uid, before.st_gid)
    except PermissionError as error:
        raise InvalidField(
            f"{path} belongs to another user or group, and its owner would change: run this "
            f"as user {before.st_uid}",
            metadata={"file": str(path), "cause": "owner"},
        ) from error
