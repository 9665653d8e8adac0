"""Watches, follows and uploads end once their caller would not be let in any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    replication_pb2,
    replication_pb2_grpc,
)
from veneer_registry.errors import Unauthenticated
from veneer_server.access import identity_file, lasting
from veneer_server.access.authenticate import Access, Credentials
from veneer_server.access.certificates import ShownCertificate
from veneer_server.access.edit_keys import add_key, revoke_key
from veneer_server.access.identity_file import IdentityFile
from veneer_server.logs import TENANT

from tests.pki import Pki
from tests.refused import refused
from tests.unit.server.access.tenants_kit import Caller, shared
from tests.unit.server.rpc.front_harness import (
    failure,
    make_adapter,
    running,
    until,
    upload,
)

WATCH = "/veneer.v1.AdapterService/WatchAdapters"
SYNCED = adapters_pb2.ADAPTER_EVENT_SYNCED


@pytest.fixture(autouse=True)
def _looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "LOOK_S", 0.05)


async def begun(caller: Caller) -> Any:
    """A watch that has had all that there is."""
    watch = caller.call("WatchAdapters")
    while (await watch.read()).event != SYNCED:
        pass
    return watch


async def ended(stream: Any) -> grpc.StatusCode:
    """How a stream that was read ends."""
    with contextlib.suppress(grpc.aio.AioRpcError):
        while await stream.read() is not grpc.aio.EOF:
            pass
    code: grpc.StatusCode = await stream.code()
    return code


def revoked(keys: Path, key: str) -> None:
    revoke_key(keys, key.split("_")[1])


def edited(keys: Path, key: str, old: str, new: str) -> None:
    """Change one line of a key's entry."""
    at = keys.read_text().index(f"[keys.{key.split('_')[1]}]")
    text = keys.read_text()
    assert old in text[at:]
    draft = keys.with_suffix(".new")
    draft.write_text(text[:at] + text[at:].replace(old, new, 1))
    draft.chmod(0o600)
    draft.replace(keys)


ENDS: dict[str, tuple[Callable[[Path, str], None], grpc.StatusCode]] = {
    "revoked": (revoked, grpc.StatusCode.UNAUTHENTICATED),
    "expired": (
        lambda keys, key: edited(
            keys, key, "roles =", "expires = 2020-01-01T00:00:00Z\nroles ="
        ),
        grpc.StatusCode.UNAUTHENTICATED,
    ),
    "other tenant": (
        lambda keys, key: edited(keys, key, 'tenant = "team-a"', 'tenant = "team-b"'),
        grpc.StatusCode.UNAUTHENTICATED,
    ),
    "fewer roles": (
        lambda keys, key: edited(keys, key, '"admin"', '"metrics"'),
        grpc.StatusCode.PERMISSION_DENIED,
    ),
}


@pytest.mark.push
@pytest.mark.parametrize("how", ENDS)
async def test_a_watch_ends_without_another_call(
    base_folder: Path, front_cache: Path, tmp_path: Path, how: str
) -> None:
    change, code = ENDS[how]
    async with shared(base_folder, front_cache, tmp_path / "front") as server:
        one, two = server.caller("team-a"), server.caller("team-a")
        ends, stays = await begun(one), await begun(two)
        change(server.keys, one.key)
        assert await ended(ends) is code
        await two.push(make_adapter(tmp_path / "a", seed=1), "chat")
        event = await stays.read()
        assert event.event == adapters_pb2.ADAPTER_EVENT_PUBLISHED
        stays.cancel()
        again = await failure(one.call("GetAdapter", name="x"))
        assert again.code in (code, grpc.StatusCode.NOT_FOUND)


@pytest.mark.push
async def test_more_roles_and_other_keys_end_nothing(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with shared(base_folder, front_cache, tmp_path / "front") as server:
        one = server.caller("team-a", "inference")
        watch = await begun(one)
        edited(server.keys, one.key, '"inference"', '"inference", "publisher"')
        # Once another watch has ended, the change has been looked at.
        two = server.caller("team-b")
        other = await begun(two)
        revoked(server.keys, two.key)
        await ended(other)
        await one.push(make_adapter(tmp_path / "a", seed=1), "chat")
        assert (await watch.read()).event == adapters_pb2.ADAPTER_EVENT_PUBLISHED
        watch.cancel()


async def test_an_answer_that_has_begun_goes_on(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with shared(base_folder, front_cache, tmp_path / "front") as server:
        one, two = server.caller("team-a"), server.caller("team-a")
        engine = server.front.engine
        engine.pace = asyncio.Semaphore(1)
        stream = one.call("GenerateStream", prompt="Hello", **_tokens(4))
        await stream.read()
        watch = await begun(two)
        revoked(server.keys, one.key)
        revoked(server.keys, two.key)
        await ended(watch)
        assert (await failure(one.generate())).code is grpc.StatusCode.UNAUTHENTICATED
        for _ in range(1000):
            engine.pace.release()
        while not (await stream.read()).HasField("final"):
            pass
        engine.pace = None


def _tokens(count: int) -> dict[str, Any]:
    return {"stopping": inference_pb2.StoppingOptions(max_tokens=count)}


async def test_an_upload_of_a_revoked_key_publishes_nothing(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with shared(base_folder, front_cache, tmp_path / "front") as server:
        one, two = server.caller("team-a"), server.caller("team-a")
        messages = list(upload(make_adapter(tmp_path / "a", seed=1), "chat"))
        sent = asyncio.Event()

        async def slowly() -> AsyncIterator[Any]:
            for message in messages[:-1]:
                yield message
            sent.set()
            await asyncio.Event().wait()

        call = server.front.adapters.UploadAdapter(slowly(), metadata=one.metadata)
        await sent.wait()
        revoked(server.keys, one.key)
        assert (await failure(call)).code is grpc.StatusCode.UNAUTHENTICATED
        assert await two.names() == []


async def test_a_follow_ends(base_folder: Path, front_cache: Path, tmp_path: Path) -> None:
    async with shared(base_folder, front_cache, tmp_path / "front") as server:
        operator = server.caller("default", "operator")
        stub: Any = replication_pb2_grpc.ReplicationServiceStub(server.front.channel)
        call = stub.Follow(metadata=operator.metadata)
        start = replication_pb2.FollowStart(follower="x")
        await call.write(replication_pb2.FollowRequest(start=start))
        while not (await call.read()).HasField("heartbeat"):
            pass
        edited(server.keys, operator.key, '"operator"', '"admin"')
        assert await ended(call) is grpc.StatusCode.PERMISSION_DENIED


def _content(file: str) -> bytes:
    return Path(file).read_bytes()


async def test_a_certificate_that_is_listed_no_more_ends_a_watch(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    pki, keys = Pki(tmp_path / "pki"), tmp_path / "keys.toml"
    add_key(keys, name="first", tenant="default", roles=["operator"], expires=None)
    before = keys.read_text()
    keys.write_text(before + '\n[certificates."ann.example.org"]\nroles = ["inference"]\n')
    cert, key = pki.client("ann.example.org")
    files = map(_content, (pki.ca_file, key, cert))
    async with running(
        base_folder,
        front_cache,
        tmp_path / "front",
        credentials=grpc.ssl_channel_credentials(*files),
        tls_cert=pki.cert,
        tls_key=pki.key,
        tls_client_ca=pki.ca_file,
        keys_file=str(keys),
    ) as front:
        stub = adapters_pb2_grpc.AdapterServiceStub(front.channel)
        watch: Any = stub.WatchAdapters(adapters_pb2.WatchAdaptersRequest())
        while (await watch.read()).event != SYNCED:
            pass
        keys.write_text(before)
        assert await ended(watch) is grpc.StatusCode.UNAUTHENTICATED


# ------------------------------------------------------------------------ by the clock


class Clock:
    """FAKE wall clock of the modules that ask it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ahead = timedelta()

        class Set(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return datetime.now(tz) + self.ahead

        now = lasting.time.time
        for module in ("lasting", "authenticate"):
            monkeypatch.setattr(
                f"veneer_server.access.{module}.time.time",
                lambda: now() + self.ahead.total_seconds(),
            )
        monkeypatch.setattr("veneer_server.access.authenticate.datetime", Set)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def held(access: Access, credentials: Credentials) -> None:
    """An open call, until it is ended."""
    principal = await access.admit(WATCH, credentials)
    with access.while_admitted(WATCH, principal, credentials):
        await asyncio.Event().wait()


async def test_a_key_ends_at_its_time_also_if_the_clock_is_set(
    tmp_path: Path, clock: Clock
) -> None:
    file = tmp_path / "keys.toml"
    expires = datetime.now(UTC) + timedelta(hours=1)
    short, long = (
        add_key(file, name=name, tenant="a", roles=["inference"], expires=at).key
        for name, at in (("short", expires), ("long", None))
    )
    access = Access(IdentityFile(file))
    calls = [
        asyncio.create_task(held(access, Credentials(f"Bearer {key}"))) for key in (short, long)
    ]
    await asyncio.sleep(0)
    clock.ahead = timedelta(hours=-3)
    await asyncio.sleep(0)
    clock.ahead = timedelta(hours=2)
    with refused(Unauthenticated, cause="key"):
        await calls[0]
    assert not calls[1].done()
    calls[1].cancel()


async def test_a_file_that_says_the_same_has_no_call_checked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of keys would be compared once a call and second, on the event loop."""
    file = tmp_path / "keys.toml"
    add_key(file, name="a", tenant="a", roles=["inference"], expires=None)
    identities = IdentityFile(file)
    before = identities.latest
    for _ in range(3):
        file.with_suffix(".new").write_text(file.read_text())
        file.with_suffix(".new").chmod(0o600)
        file.with_suffix(".new").replace(file)
        assert await identities.current() is before


async def test_a_file_that_is_being_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Editors and `cp` empty a file before they write it."""
    file = tmp_path / "keys.toml"
    key = add_key(file, name="a", tenant="a", roles=["inference"], expires=None).key
    access, before = Access(IdentityFile(file)), file.read_text()
    monkeypatch.setattr(lasting, "LOOK_S", 3600.0)
    call = asyncio.create_task(held(access, Credentials(f"Bearer {key}")))
    await until(lambda: bool(access.lasting.calls))  # private: it was let in
    monkeypatch.setattr(identity_file, "SETTLED_NS", 10**18)  # private: written just now
    file.write_text("")
    for _ in range(3):
        await access.lasting.look()  # private: what the timer does
    assert not call.done()
    file.write_text(before)
    await access.lasting.look()
    monkeypatch.setattr(identity_file, "SETTLED_NS", -(10**18))  # private: time passes
    await access.lasting.look()
    assert not call.done()
    # The clock was set back by hours: the file seems to be written all the time.
    monkeypatch.setattr(identity_file, "SETTLED_NS", 10**18)
    revoked(file, key)
    for _ in range(lasting.MOST_PUT_OFF + 1):
        await access.lasting.look()
    with refused(Unauthenticated, cause="key"):
        await call


async def test_a_timer_is_no_part_of_the_call_that_starts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lasting, "LOOK_S", 0.0)
    file, found = tmp_path / "keys.toml", asyncio.get_running_loop().create_future()
    key = add_key(file, name="a", tenant="team-a", roles=["inference"], expires=None).key
    identities = IdentityFile(file)
    access = Access(identities)
    current = identities.current

    async def looked() -> Any:
        if asyncio.current_task() is not call and not found.done():
            found.set_result(TENANT.get())
        return await current()

    monkeypatch.setattr(identities, "current", looked)
    call = asyncio.create_task(held(access, Credentials(f"Bearer {key}")))
    assert await found == ""
    call.cancel()


async def test_a_certificate_ends_at_its_time(tmp_path: Path, clock: Clock) -> None:
    """TLS has verified it when the client connected, which may be months ago."""
    file = tmp_path / "keys.toml"
    file.write_text('[certificates."ann.example.org"]\nroles = ["inference"]\n')
    access = Access(IdentityFile(file))
    until = (datetime.now(UTC) + timedelta(hours=1)).timestamp()
    shows = Credentials(certificate=ShownCertificate(("ann.example.org",), until))
    call = asyncio.create_task(held(access, shows))
    await asyncio.sleep(0)
    assert not call.done()
    clock.ahead = timedelta(hours=2)
    with refused(Unauthenticated, cause="certificate"):
        await call
    with refused(Unauthenticated, cause="certificate"):
        await access.admit(WATCH, shows)
