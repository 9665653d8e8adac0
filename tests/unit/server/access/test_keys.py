"""The keys file: what it may say, and how a server that runs follows it."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_registry.errors import InvalidField, PermissionDenied, Unauthenticated
from veneer_server.access import edit_keys
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.edit_keys import add_key, list_keys, revoke_key
from veneer_server.access.identity_file import IdentityFile
from veneer_server.access.principal import Role
from veneer_server.operate import key_cli

from tests.places import REPOSITORY
from tests.refused import refused

GENERATE = "/veneer.v1.InferenceService/Generate"
DIGEST = "0" * 64
KEY_NEW = (sys.executable, "-m", "veneer_server", "key", "new", "--keys-file", "keys.toml")


def put(file: Path, content: str | bytes | None) -> str:
    """Write a file, or remove it; returns what it was."""
    before = file.read_text(errors="replace") if file.exists() else ""
    if content is None:
        file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content)
    return before


def new(file: Path, *roles: Role, name: str = "caller") -> str:
    return add_key(
        file, name=name, tenant="default", roles=[*roles] or ["inference"], expires=None
    ).key


async def asks(access: Access, key: str) -> str:
    """Who a call with this key is from."""
    return (await access.admit(GENERATE, Credentials(f"Bearer {key}"))).name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


async def test_a_key_is_let_in_by_either_header(file: Path) -> None:
    access = Access(IdentityFile(_with(file)))
    key = new(file, name="app")
    for credentials in (
        Credentials(f"Bearer {key}"),
        Credentials(f"bearer  {key} "),
        Credentials(api_key=key),
        Credentials.of_headers({"x-api-key": key}),
        Credentials.of_headers({"api-key": key}),
    ):
        assert (await access.admit(GENERATE, credentials)).name == "app"
    for wrong in (
        Credentials(key),
        Credentials(f"Basic {key}"),
        Credentials(f"Basic {key}", key),
        Credentials.of_headers({"authorization": f"Basic {key}", "api-key": key}),
        Credentials("Bearer"),
        Credentials("Bearer " + "x" * 10_000),
        Credentials(f"Bearer {key}x"),
        Credentials(f"Bearer {key.replace('_', '-')}"),
        Credentials("Bearer vn_\u00e9_x"),
    ):
        with pytest.raises(Unauthenticated) as caught:
            await access.admit(GENERATE, wrong)
        assert key not in caught.value.message


def _with(file: Path) -> Path:
    """The file, with one key."""
    new(file, name="first")
    return file


async def test_a_server_follows_the_file_at_the_next_call(file: Path) -> None:
    access = Access(IdentityFile(_with(file)))
    keys = []
    for number in range(20):
        keys.append(new(file, name=f"n{number}"))
        assert await asks(access, keys[-1]) == f"n{number}"
    for number, key in enumerate(keys):
        revoke_key(file, key.split("_")[1])
        with refused(Unauthenticated, cause="key"):
            await asks(access, key)
        if number + 1 < len(keys):
            assert await asks(access, keys[-1]) == "n19"


async def test_keys_replaced_under_calls_refuse_no_valid_one(file: Path) -> None:
    """As a program that rotates keys does it: the new one is there before the old one goes."""
    access = Access(IdentityFile(_with(file)))
    lasting, stop = new(file, name="lasting"), asyncio.Event()
    calls = 0

    async def call() -> None:
        nonlocal calls
        while not stop.is_set():
            assert await asks(access, lasting) == "lasting"
            calls += 1
            await asyncio.sleep(0)

    callers = [asyncio.create_task(call()) for _ in range(8)]
    old = new(file, name="rotated")
    for _ in range(30):
        key = await asyncio.to_thread(new, file, name="rotated")
        assert await asks(access, old) == await asks(access, key) == "rotated"
        await asyncio.to_thread(revoke_key, file, old.split("_")[1])
        with refused(Unauthenticated, cause="key"):
            await asks(access, old)
        old = key
    stop.set()
    await asyncio.gather(*callers)
    assert calls > 30


@pytest.mark.parametrize("damage", ["not toml [", "[keys.x]\n", b"\xff\xfe", None])
async def test_a_broken_file_leaves_the_last_keys_in_use(
    file: Path, damage: str | bytes | None
) -> None:
    key = new(file)
    identities = IdentityFile(file)
    access = Access(identities)
    assert await asks(access, key) == "caller"
    good = put(file, damage)
    for _ in range(3):
        assert await asks(access, key) == "caller"
    assert not identities.usable
    put(file, good)
    assert await asks(access, key) == "caller"
    assert identities.usable


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (f'[keys.abcdefgh]\nroles = ["king"]\nsha256 = "{DIGEST}"', "keys.abcdefgh.roles"),
        (f'[keys.abcdefgh]\nsha256 = "{DIGEST}"', "keys.abcdefgh.roles"),
        (f'[keys.abcdefgh]\nroles = []\nsha256 = "{DIGEST}"', "keys.abcdefgh.roles"),
        (f'[keys.abcdefgh]\nroles = "admin"\nsha256 = "{DIGEST}"', "keys.abcdefgh.roles"),
        ('[keys.abcdefgh]\nroles = ["admin"]\nsha256 = "12"', "keys.abcdefgh.sha256"),
        ('[keys.abcdefgh]\nroles = ["admin"]', "keys.abcdefgh.sha256"),
        ('[keys.Admin]\nroles = ["admin"]', "keys.Admin"),
        ("keys = 3", "keys"),
        ("[users]", "users"),
        (
            f'[keys.abcdefgh]\nroles = ["admin"]\nsha256 = "{DIGEST}"\nexpires = "soon"',
            "keys.abcdefgh.expires",
        ),
        (
            f'[keys.abcdefgh]\nroles = ["admin"]\nsha256 = "{DIGEST}"\nexpire = 1',
            "keys.abcdefgh.expire",
        ),
        (
            f'[keys.abcdefgh]\nroles = ["admin"]\nsha256 = "{DIGEST}"\ntenant = "A/b"',
            "keys.abcdefgh.tenant",
        ),
        ('[certificates."a.example"]\nroles = ["nobody"]', "certificates.'a.example'.roles"),
        ('[tenants.a]\naccepts = "b"', "tenants.a.accepts"),
        ("[tenants.a]\naccepts = [3]", "tenants.a.accepts"),
        ('[tenants.a]\naccepts = ["B"]', "tenants.a.accepts"),
        ('[tenants.a]\naccepts = ["b/"]', "tenants.a.accepts"),
        ('[tenants.a]\naccepts = ["b/c/d"]', "tenants.a.accepts"),
    ],
)
def test_a_wrong_entry_is_named(file: Path, text: str, field: str) -> None:
    file.write_text(text)
    with refused(InvalidField, field=field):
        IdentityFile(file)


def test_a_file_that_anybody_may_write_is_refused(file: Path) -> None:
    new(file)
    file.chmod(0o666)
    with refused(InvalidField, cause="writable"):
        IdentityFile(file)


@pytest.mark.parametrize("kind", ["missing", "folder", "fifo", "huge"])
def test_a_file_that_is_none_is_refused(file: Path, kind: str) -> None:
    match kind:
        case "folder":
            file.mkdir()
        case "fifo":
            os.mkfifo(file)
        case "huge":
            file.write_bytes(b"#" * (5 << 20))
    with refused(InvalidField):
        IdentityFile(file)


async def test_times_without_a_zone_are_utc(file: Path) -> None:
    key = new(file)
    later = datetime.now(UTC).replace(tzinfo=None, year=2100).isoformat(timespec="seconds")
    text = put(file, "")
    put(file, text.replace("sha256", f"expires = {later}\nsha256"))
    assert await asks(Access(IdentityFile(file)), key) == "caller"
    put(file, text.replace("sha256", "expires = 2001-01-01T00:00:00\nsha256"))
    with refused(Unauthenticated, cause="key"):
        await asks(Access(IdentityFile(file)), key)


def test_editing_keeps_comments_and_other_keys(file: Path) -> None:
    first = new(file, name="one")
    file.write_text("# ours\n" + file.read_text() + "\n# the end\n")
    file.chmod(0o640)
    new(file, name="two")
    revoke_key(file, first)
    assert [key.principal.name for key in list_keys(file)] == ["two"]
    text = file.read_text()
    assert text.startswith("# ours\n")
    assert file.stat().st_mode & 0o777 == 0o640
    with refused(InvalidField, field="id"):
        revoke_key(file, "abcdefgh")


def test_editing_as_root_leaves_the_file_to_its_owner(file: Path) -> None:
    """A server of that user must be able to read what was revoked."""
    new(file)
    owner = 65534 if os.geteuid() == 0 else os.geteuid()
    os.chown(file, owner, -1)
    key = new(file)
    assert file.stat().st_uid == owner
    revoke_key(file, key)
    assert file.stat().st_uid == owner


def test_the_file_does_not_hold_the_key(file: Path) -> None:
    key = new(file)
    assert key.split("_", 2)[2] not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


async def test_a_role_that_is_missing_is_named(file: Path) -> None:
    key = new(file, "publisher")
    access = Access(IdentityFile(file))
    with refused(PermissionDenied, cause="role", roles="inference"):
        await access.admit(GENERATE, Credentials(f"Bearer {key}"))


@pytest.mark.push
def test_the_command_line(file: Path) -> None:
    """As an operator uses it."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = REPOSITORY / ".venv" / "bin" / "veneer-server"
        return subprocess.run(
            [program, "key", *arguments, "--keys-file", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )

    made = run("new", "--name", "ci", "--role", "publisher", "--expires", "90d", "--gateway")
    key = made.stdout.strip()
    assert key.startswith("vn_")
    listed = json.loads(run("ls", "--json").stdout)
    assert [(k["name"], k["roles"], k["expired"], k["gateway"]) for k in listed] == [
        ("ci", ["publisher"], False, True)
    ]
    assert key.split("_", 2)[2] not in run("ls").stdout
    assert run("revoke", listed[0]["id"]).returncode == 0
    again = run("revoke", listed[0]["id"])
    assert (again.returncode, "key ls" in again.stderr) == (1, True)
    for wrong in (("--role", "king"), ("--expires", "soon"), ("--tenant", "A b")):
        failed = run("new", *wrong)
        assert (failed.returncode, failed.stdout) == (1, "")


def _made(folder: Path, *flags: str, umask: int = 0o022) -> subprocess.CompletedProcess[str]:
    """`key new` with its output in ``shown``, as a shell redirects it."""
    with (folder / "shown").open("w") as shown:
        return subprocess.run(
            [*KEY_NEW, *flags],
            cwd=folder,
            stdout=shown,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            umask=umask,
        )


def test_a_key_goes_to_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    done = _made(tmp_path, "--out", "me.key")
    assert done.returncode == 0, done.stderr
    assert stat.S_IMODE((tmp_path / "me.key").stat().st_mode) == 0o600
    key = (tmp_path / "me.key").read_text()
    assert key == key.strip()
    assert key
    assert key not in (tmp_path / "shown").read_text() + done.stderr
    again = _made(tmp_path, "--out", "me.key")
    assert (again.returncode, "it exists" in again.stderr) == (1, True)
    assert (tmp_path / "me.key").read_text() == key
    assert len(list_keys(tmp_path / "keys.toml")) == 1, "no key was made for nothing"
    bad = _made(tmp_path, "--out", "other.key", "--expires", "soon")
    assert bad.returncode == 1
    assert not (tmp_path / "other.key").exists()
    nowhere = _made(tmp_path, "--out", "none/me.key")
    assert (nowhere.returncode, "choose a file" in nowhere.stderr) == (1, True)
    assert "Errno" not in nowhere.stderr
    assert len(list_keys(tmp_path / "keys.toml")) == 1


def test_a_key_that_could_not_be_written_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk, of which /dev/full is a FAKE."""

    keys, out = tmp_path / "keys.toml", tmp_path / "me.key"
    open_file = os.open

    def full(path: Path, *how: int) -> int:
        if path == out:
            os.close(open_file(out, *how))
            return open_file("/dev/full", os.O_WRONLY)
        return open_file(path, *how)

    monkeypatch.setattr(os, "open", full)
    failed = CliRunner().invoke(
        key_cli.key_cli, ["new", "--keys-file", str(keys), "--out", str(out)]
    )
    assert (failed.exit_code, "No space left" in failed.stderr) == (1, True), failed.output
    assert "free space" in failed.stderr
    assert not out.exists()
    assert list_keys(keys) == []

    def stays(path: Path, id: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(edit_keys, "revoke_key", stays)
    failed = CliRunner().invoke(
        key_cli.key_cli, ["new", "--keys-file", str(keys), "--out", str(out)]
    )
    (left,) = list_keys(keys)
    assert f"key revoke {left.id}" in failed.stderr


def test_a_key_that_others_can_read_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "shown").touch(mode=0o644)
    told = _made(tmp_path).stderr
    assert "all users can read" in told
    assert "--out FILE" in told
    (tmp_path / "shown").chmod(0o600)
    assert "can read" not in _made(tmp_path).stderr
