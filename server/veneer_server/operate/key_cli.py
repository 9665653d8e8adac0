"""``veneer-server key``: the API keys in a keys file."""

from __future__ import annotations

import json
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from veneer_registry.command_line import Program
from veneer_registry.errors import InvalidField, VeneerError

from veneer_server.access.keys import ApiKey
from veneer_server.access.principal import DEFAULT_TENANT, ROLES
from veneer_server.config import load_config
from veneer_server.operate.flags import Debug, Json, guarded, options, with_flags
from veneer_server.quotas.quota import Quota

if TYPE_CHECKING:
    from veneer_server.access.edit_keys import NewKey

key_cli = Program(help="Create, list and revoke API keys.")

_LIMITS = [field.name.replace("_", "-") for field in fields(Quota)]
_UNITS = {"h": 1, "d": 24, "w": 168}


@key_cli.command(
    "new",
    epilog="""
Examples:

  veneer-server key new --keys-file keys.toml --name ci --role publisher --expires 90d

  veneer-server key new --keys-file keys.toml --name me --role admin --out me.key

  veneer-server key new --keys-file keys.toml --name chat-app --tenant team-a \\
    --limit requests-per-minute=60 --limit tokens-per-minute=100000
""",
)
@with_flags(options("keys_file"))
def new_key(
    *,
    name: Annotated[
        str, typer.Option(help="Name of the key's owner, shown in logs; default: the key's id.")
    ] = "",
    tenant: Annotated[
        str, typer.Option(help="Tenant that the key belongs to.")
    ] = DEFAULT_TENANT,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Role of the key: {', '.join(ROLES)}; repeatable. Default: inference."
        ),
    ] = None,
    expires: Annotated[
        str,
        typer.Option(help="Validity, such as 12h, 90d or 4w; default: no expiry."),
    ] = "",
    limit: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NUMBER",
            help=f"Limit of the key: {', '.join(_LIMITS)}; repeatable. Bytes may "
            "have a unit, as in 2GiB. Unset limits take the file's default, or none.",
        ),
    ] = None,
    gateway: Annotated[
        bool,
        typer.Option(
            "--gateway",
            help="The key's caller is a gateway: it may name the user it calls for, and "
            "users get fair shares.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write the key to this new file, which only you can read; print none.",
        ),
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Create a key and print it once: the file stores only its digest."""
    from veneer_server.access.edit_keys import add_key, revoke_key

    def run() -> None:
        made = make() if out is None else _written(out, make, lambda id: revoke_key(file(), id))
        if as_json:
            shown = {"id": made.id} if out is not None else {"id": made.id, "key": made.key}
            print(json.dumps(shown))
            return
        if out is not None:
            print(f"{out} has the key; its id is {made.id}")
            return
        print(made.key)
        print(
            f"veneer-server: the key is shown only this once; its id is {made.id}",
            file=sys.stderr,
        )
        if others := _readers_of_output():
            print(
                f"veneer-server: warning: {others} can read the file that it was written to: "
                "chmod 600 it; --out FILE makes it private from the start",
                file=sys.stderr,
            )

    def file() -> Path:
        return _file(flags)

    def make() -> NewKey:
        roles: Any = list(dict.fromkeys(role or ["inference"]))
        for each in roles:
            if each not in ROLES:
                raise InvalidField(
                    f"--role {each} is not allowed: choose one of {', '.join(ROLES)}; give "
                    "--role several times for several",
                    metadata={"field": "role"},
                )
        return add_key(
            file(),
            name=name,
            tenant=tenant,
            roles=roles,
            expires=_expiry(expires),
            limits=dict(map(_limit, limit or ())),
            gateway=gateway,
        )

    guarded(run, debug)


def _written(path: Path, make: Callable[[], NewKey], revoke: Callable[[str], None]) -> NewKey:
    """Make a key and write it to a new file; on an error, remove both.

    Raises:
        InvalidField: the file exists or cannot be written, or ``make`` raised it.
    """
    file, made = _new_private_file(path), None
    try:
        with file:
            made = make()
            file.write(made.key)  # no line break: some tools use the whole file as a secret
    except BaseException as error:
        path.unlink(missing_ok=True)
        if made is None:
            raise
        left = "no key was made"
        try:
            revoke(made.id)
        except (OSError, VeneerError):  # the keys file may be on the same full disk
            left = f"`veneer-server key revoke {made.id}` removes the unused key"
        if isinstance(error, OSError):
            raise InvalidField(
                f"--out {path}: {error.strerror}; {left}: free space, or choose another file",
                metadata={"field": "out"},
            ) from error
        raise
    return made


def _new_private_file(path: Path) -> TextIO:
    """Create a file that only this user can read. Raises InvalidField if the file exists or
    cannot be created."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise InvalidField(
            f"--out {path}: it exists; remove it, or choose another file",
            metadata={"field": "out"},
        ) from error
    except OSError as error:
        raise InvalidField(
            f"--out {path}: {error.strerror}; choose a file in a folder that exists and that "
            "you may write to",
            metadata={"field": "out"},
        ) from error
    return open(descriptor, "w", encoding="ascii")


def _readers_of_output() -> str:
    """Other users who can read the file that standard output goes to, in words; "" if there are
    none, or if it is not a file."""
    try:
        found = os.fstat(1)
    except OSError:  # closed
        return ""
    if not stat.S_ISREG(found.st_mode):
        return ""
    if found.st_mode & stat.S_IROTH:
        return "all users"
    return "its group" if found.st_mode & stat.S_IRGRP else ""


@key_cli.command("ls")
@with_flags(options("keys_file"))
def list_all(*, as_json: Json = False, debug: Debug = False, **flags: Any) -> None:
    """List the keys: id, name, tenant, roles and expiry."""
    from veneer_server.access.edit_keys import list_keys

    def run() -> None:
        now = datetime.now(UTC)
        keys = list_keys(_file(flags))
        if as_json:
            print(
                json.dumps(
                    [
                        {
                            "id": key.id,
                            "name": key.principal.name,
                            "tenant": key.principal.tenant,
                            "roles": sorted(key.principal.roles),
                            "gateway": key.principal.gateway,
                            "expires": key.expires.isoformat() if key.expires else None,
                            "expired": key.expired(now),
                            "limits": _limits_of(key),
                        }
                        for key in keys
                    ]
                )
            )
            return
        rows = [("ID", "NAME", "TENANT", "ROLES", "EXPIRES", "LIMITS")]
        for key in keys:
            when = "never" if key.expires is None else f"{key.expires:%Y-%m-%d %H:%M} UTC"
            rows.append(
                (
                    key.id,
                    key.principal.name,
                    key.principal.tenant,
                    ",".join(sorted(key.principal.roles)),
                    f"{when} (expired)" if key.expired(now) else when,
                    ",".join(
                        f"{name.replace('_', '-')}={value}"
                        for name, value in _limits_of(key).items()
                    ),
                )
            )
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())

    guarded(run, debug)


@key_cli.command("revoke")
@with_flags(options("keys_file"))
def revoke(
    id: Annotated[str, typer.Argument(help="The key's id.")],
    *,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Revoke a key: a running server refuses its next call."""
    from veneer_server.access.edit_keys import revoke_key

    guarded(lambda: revoke_key(_file(flags), id), debug)


def _file(flags: dict[str, Any]) -> Path:
    file = load_config(flags, os.environ).keys_file
    if file is None:
        raise InvalidField(
            "no keys file: give --keys-file, or set VENEER_KEYS_FILE",
            metadata={"field": "keys_file"},
        )
    return file


def _limit(text: str) -> tuple[str, object]:
    """Parse a limit into the keys file's form; its name is checked with the file."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InvalidField(
            f"--limit {text} is not allowed: give NAME=NUMBER, such as requests-per-minute=60",
            metadata={"field": "limit"},
        )
    number = int(value) if re.fullmatch(r"[+-]?\d{1,30}", value) else value
    return name.strip().replace("-", "_"), number


def _limits_of(key: ApiKey) -> dict[str, int]:
    """The key's own limits, including the file's defaults."""
    return {
        name: value
        for account in key.principal.accounts
        if account.id == f"key:{key.id}"
        for name, value in account.quota.given.items()
    }


def _expiry(text: str) -> datetime | None:
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,5})([hdw])", text)
    if match is None:
        raise InvalidField(
            f"--expires {text} is not allowed: give a time such as 12h, 90d or 4w",
            metadata={"field": "expires"},
        )
    return datetime.now(UTC) + timedelta(hours=int(match[1]) * _UNITS[match[2]])
