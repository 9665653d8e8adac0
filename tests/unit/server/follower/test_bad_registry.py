"""A registry that sends what it should not: a follower says so, and recovers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from veneer_proto.v1 import replication_pb2 as pb
from veneer_registry.errors import DiskFull, Unavailable
from veneer_registry.registry import Registry
from veneer_registry.registry_copy import RegistryCopy
from veneer_server.config import load_config
from veneer_server.follower import follower as follower_module
from veneer_server.follower import link
from veneer_server.follower.follower import Follower, NameChange
from veneer_server.follower.standing import Standing
from veneer_server.replication.feed import Feed
from veneer_server.replication.replicas import Replicas
from veneer_server.rpc.replication_service import ReplicationService

from tests.ports import free_port
from tests.refused import refused
from tests.unit.registry.kit import BASE, make_adapter, push

Spoil = Callable[[int, pb.FollowResponse], bytes]
"""What is sent instead of a connection's message with that number."""


def honest(number: int, message: pb.FollowResponse) -> bytes:
    return message.SerializeToString()


@dataclass
class Scripted:
    """A registry on a real port, which spoils what it tells.

    Attributes:
        spoil: for each connection in turn; the last one for all others.
        refuse: raw status details with which the next connections end.
        delay_s: how long each message is on its way.
    """

    registry: Registry
    spoil: list[Spoil] = field(default_factory=lambda: [honest])
    refuse: list[bytes] = field(default_factory=list)
    connections: int = 0
    delay_s: float = 0.0
    replicas: Replicas = field(default_factory=Replicas)
    address: str = ""

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        feed = Feed()
        feed.add("default", self.registry)
        service: Any = ReplicationService(
            feed, self.replicas, {"default": self.registry}.get, heartbeat_s=0.1
        )

        async def follow(requests: Any, context: Any) -> None:
            if self.refuse:
                details = (("grpc-status-details-bin", self.refuse.pop()),)
                await context.abort(grpc.StatusCode.UNAVAILABLE, "no", details)
            spoil = self.spoil[min(self.connections, len(self.spoil) - 1)]
            self.connections += 1
            sent, delay_s = 0, self.delay_s

            class Written:
                async def write(self, message: pb.FollowResponse) -> None:
                    nonlocal sent
                    sent += 1
                    await asyncio.sleep(delay_s)
                    await context.write(spoil(sent - 1, message))

            await service.Follow(requests, Written())

        handler = grpc.stream_stream_rpc_method_handler(
            follow, request_deserializer=pb.FollowRequest.FromString
        )
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            [
                grpc.method_handlers_generic_handler(
                    "veneer.v1.ReplicationService", {"Follow": handler}
                )
            ]
        )
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        try:
            yield
        finally:
            feed.close()
            await server.stop(0)


@pytest.fixture
def scripted(tmp_path: Path) -> Any:
    with Registry.open(tmp_path / "data", BASE) as registry:
        for number, name in enumerate(("one", "two", "three")):
            push(registry, name, make_adapter(tmp_path / name, seed=number))
        yield Scripted(registry)


@asynccontextmanager
async def following(
    scripted: Scripted, tmp_path: Path, applied: Any = None
) -> AsyncIterator[tuple[Follower, Any]]:
    folder = tmp_path / "follower"
    values = {
        "role": "engine",
        "registry": scripted.address,
        "data_dir": str(folder),
        "cache_dir": str(folder / "cache"),
    }
    follower = Follower(load_config(values, {}), BASE)
    mirror = await asyncio.to_thread(follower.open, folder, None)

    async def nothing(change: NameChange) -> None:
        pass

    follower.start(applied or nothing, lambda digest: False)
    try:
        yield follower, mirror
    finally:
        await follower.stop()
        mirror.close()


async def until(holds: Callable[[], bool]) -> None:
    """pytest's timeout is the limit."""
    while not holds():  # noqa: ASYNC110 - it waits for states that have no event
        await asyncio.sleep(0.005)


def _no_protobuf(number: int, message: pb.FollowResponse) -> bytes:
    return b"\xff" * 16


def _unknown_kind(number: int, message: pb.FollowResponse) -> bytes:
    return b""


def _endless_heartbeat(number: int, message: pb.FollowResponse) -> bytes:
    if message.HasField("begin"):
        message.begin.heartbeat.CopyFrom(Duration(seconds=1 << 60))
    return message.SerializeToString()


def _garbage_later(number: int, message: pb.FollowResponse) -> bytes:
    return honest(number, message) if number < 6 else b"\xff\xff"


@pytest.mark.parametrize(
    "spoil", [_no_protobuf, _unknown_kind, _endless_heartbeat, _garbage_later]
)
async def test_a_follower_connects_again_after_garbage(
    scripted: Scripted, tmp_path: Path, spoil: Spoil, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "REFUSED_WAIT_S", 0.01)
    scripted.spoil = [spoil, honest]
    async with scripted.serving(), following(scripted, tmp_path) as (follower, mirror):
        await until(lambda: scripted.connections > 1 and follower.standing.connected)
        assert {"one", "two", "three"} == mirror.entries().keys()


async def test_a_follower_connects_again_after_status_details_that_are_garbage(
    scripted: Scripted, tmp_path: Path
) -> None:
    scripted.refuse = [b"\xff" * 9]
    async with scripted.serving(), following(scripted, tmp_path) as (follower, mirror):
        await until(lambda: follower.standing.connected)
        assert mirror.resolve("one")


def _of_another_version(number: int, message: pb.FollowResponse) -> bytes:
    """As a later version may write it: the follower cannot read this manifest."""
    if message.HasField("state") and message.state.name == "two":
        for each in message.state.revisions:
            each.manifest = each.manifest.replace('"version":1', '"version":2')
            each.manifest = each.manifest.replace('"max_rank"', '"top_rank"')
    return message.SerializeToString()


async def test_what_a_follower_cannot_read_is_refused_and_takes_nothing_else_along(
    scripted: Scripted, tmp_path: Path
) -> None:
    scripted.spoil = [_of_another_version]
    told = []

    async def applied(change: NameChange) -> None:
        if (now := change.state.entry and change.state.entry.current) is not None:
            change.registry.get(f"{now.name}@{now.revision}")  # as the server does
        told.append(change.state.name)

    registry = scripted.registry
    async with scripted.serving(), following(scripted, tmp_path, applied) as (found, mirror):
        await until(lambda: found.standing.connected)
        with refused(Unavailable, cause="version"), mirror.acquire("two"):
            pass
        for name in ("one", "three"):
            with mirror.acquire(name):
                pass
        again = make_adapter(tmp_path / "again", seed=9)
        for name in ("two", "one"):
            push(registry, name, again, allow_replace=True)
        now = registry.resolve("one").revision
        await until(lambda: mirror.resolve("one").revision == now)
        registry.delete("two")
        await until(lambda: "two" not in mirror)


async def test_a_name_that_could_not_be_taken_over_is_tried_again(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its old weights would serve until its next change, which may be never."""
    monkeypatch.setattr(follower_module, "AGAIN_S", 0.02)
    apply, tries = RegistryCopy.apply, 0

    def broken(replica: RegistryCopy, states: Any, place: Any) -> Any:
        nonlocal tries
        if (two := states.get("two")) is not None and two.entry.current != first:
            tries += 1
            if tries < 3:
                raise MemoryError
        return apply(replica, states, place)

    async with scripted.serving(), following(scripted, tmp_path) as (_, mirror):
        await until(lambda: "three" in mirror)
        first = mirror.resolve("two")
        monkeypatch.setattr(RegistryCopy, "apply", broken)
        again = make_adapter(tmp_path / "again", seed=9)
        for name in ("two", "one"):
            push(scripted.registry, name, again, allow_replace=True)
        now = scripted.registry.resolve("one")
        await until(lambda: mirror.resolve("one") == now)
        await until(lambda: mirror.resolve("two") == scripted.registry.resolve("two"))
        assert tries == 3


class Reports(Replicas):
    """Keeps what a follower has told."""

    def __init__(self) -> None:
        super().__init__(lease_s=0.2)
        self.told: list[int] = []

    def report(self, follower: str, sequence: int) -> None:
        self.told.append(sequence)
        super().report(follower, sequence)


async def test_a_change_is_not_told_as_applied_while_it_is_being_applied(
    scripted: Scripted, tmp_path: Path
) -> None:
    reports, gate = Reports(), asyncio.Event()
    scripted.replicas = reports
    gate.set()

    async def applied(change: NameChange) -> None:
        await gate.wait()

    async with scripted.serving(), following(scripted, tmp_path, applied):
        await until(lambda: 3 in reports.told)
        gate.clear()
        push(scripted.registry, "four", make_adapter(tmp_path / "four", seed=4))
        reports.told.clear()
        await until(lambda: len(reports.told) > 3)
        assert set(reports.told) == {3}
        gate.set()
        await until(lambda: 4 in reports.told)


async def test_why_a_registry_was_never_followed_is_known(
    scripted: Scripted, tmp_path: Path
) -> None:
    scripted.address = f"127.0.0.1:{free_port()}"
    async with following(scripted, tmp_path) as (follower, _):
        await until(lambda: scripted.address in follower.standing.fault)


async def test_heartbeats_and_reports_do_not_answer_each_other_for_ever(
    scripted: Scripted, tmp_path: Path
) -> None:
    """While nothing changes, one goes each way for each heartbeat's time, which is 0.1 s."""
    sent: list[float] = []

    def counted(number: int, message: pb.FollowResponse) -> bytes:
        sent.append(time.monotonic())
        return honest(number, message)

    scripted.spoil = [counted]
    async with scripted.serving(), following(scripted, tmp_path) as (follower, _):
        await until(lambda: follower.standing.connected and len(sent) > 20)
    assert sent[20] - sent[5] > 0.5, "at least half of fifteen times 0.1 s, and no round trips"


@pytest.mark.parametrize("echoes", [True, False])
async def test_how_long_messages_took_counts_for_the_age_of_a_view(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, echoes: bool
) -> None:
    """A registry of an older version does not echo the follower's time: then it is unknown."""

    def older(number: int, message: pb.FollowResponse) -> bytes:
        if number == 0:
            message.begin.echoes = False
        return honest(number, message)

    scripted.delay_s = 0.3
    scripted.spoil = [honest if echoes else older]
    ages: list[float] = []
    current = Standing.current

    def noting(standing: Standing, at: float | None = None) -> None:
        current(standing, at)
        ages.append(standing.lag_s)

    monkeypatch.setattr(Standing, "current", noting)
    async with scripted.serving(), following(scripted, tmp_path):
        await until(lambda: len(ages) > 5)
    assert (min(ages) >= scripted.delay_s) is echoes


@pytest.mark.parametrize("clock_s", [-3600.0, 3600.0])
async def test_a_kept_view_does_not_look_current_after_the_clock_was_set(
    scripted: Scripted, tmp_path: Path, clock_s: float
) -> None:
    async with scripted.serving(), following(scripted, tmp_path) as (follower, _):
        await until(lambda: follower.standing.connected)
    noted = tmp_path / "follower/follower/current"
    os.utime(noted, (0, noted.stat().st_mtime - clock_s))
    async with following(scripted, tmp_path) as (follower, mirror):
        assert mirror.resolve("one")
        with refused(Unavailable, cause="registry_lag"):
            follower.standing.check(60)


def _tenant(name: str) -> Spoil:
    def spoil(number: int, message: pb.FollowResponse) -> bytes:
        if message.HasField("state"):
            message.state.tenant = name
        return message.SerializeToString()

    return spoil


@pytest.mark.parametrize("tenant", ["../../outside", "/tmp/outside", "", ".."])
async def test_a_tenant_that_cannot_be_one_becomes_no_folder(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tenant: str
) -> None:
    monkeypatch.setattr(link, "REFUSED_WAIT_S", 0.01)
    scripted.spoil = [_tenant(tenant), honest]
    async with scripted.serving(), following(scripted, tmp_path) as (follower, mirror):
        await until(lambda: scripted.connections > 1 and follower.standing.connected)
        assert mirror.resolve("one")
        names = tmp_path / "follower/follower/names"
        assert [each.name for each in names.iterdir()] == ["default"]


async def test_names_of_a_tenant_that_this_server_may_not_open_are_left_out(
    scripted: Scripted, tmp_path: Path
) -> None:
    """Each open tenant takes descriptors, and a registry may have any number of them."""
    scripted.spoil = [_tenant("acme")]
    values = {
        "role": "engine",
        "data_dir": str(tmp_path / "follower"),
        "cache_dir": str(tmp_path / "cache"),
    }
    async with scripted.serving():
        follower = Follower(load_config(values | {"registry": scripted.address}, {}), BASE)
        default = await asyncio.to_thread(follower.open, tmp_path / "follower", None)
        follower.start(_nothing, lambda digest: False, lambda tenant: tenant == "default")
        # The checksum is that of the tenant's real name.
        await until(lambda: scripted.connections > 1)
        await follower.stop()
        default.close()
    assert not (tmp_path / "follower/follower/names/acme").exists()


async def _nothing(change: NameChange) -> None:
    pass


async def test_a_place_is_not_kept_while_a_name_is_behind(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would acknowledge a change that it does not have."""
    apply = RegistryCopy.apply

    def broken(copy: RegistryCopy, states: Any, place: Any) -> Any:
        if (two := states.get("two")) is not None and two.entry.current != first:
            raise OSError("no space")
        return apply(copy, states, place)

    async with scripted.serving(), following(scripted, tmp_path) as (follower, mirror):
        await until(lambda: follower.standing.connected)
        first = mirror.resolve("two")
        monkeypatch.setattr(RegistryCopy, "apply", broken)
        again = make_adapter(tmp_path / "again", seed=9)
        for name in ("two", "one"):
            push(scripted.registry, name, again, allow_replace=True)
        now = scripted.registry.resolve("one")
        await until(lambda: mirror.resolve("one") == now)
    async with following(scripted, tmp_path) as (follower, mirror):
        assert mirror.resolve("one") == now
        assert follower.view.place()[0] == "", "only a snapshot tells what is missing"


async def test_a_disk_that_is_full_at_the_start_costs_no_names(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with scripted.serving(), following(scripted, tmp_path) as (follower, _):
        await until(lambda: follower.standing.connected)

    def full(*given: Any, **named: Any) -> Any:
        raise DiskFull("no space")

    with monkeypatch.context() as patch:
        patch.setattr(follower_module, "open_copy", full)
        opening = following(scripted, tmp_path)
        with pytest.raises(DiskFull):
            await opening.__aenter__()
    async with following(scripted, tmp_path) as (_, mirror):
        assert mirror.resolve("one")


async def test_how_old_the_registrys_own_view_was_is_kept(
    scripted: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is cut off from its catalog, and so is the follower after its restart."""
    monkeypatch.setattr(follower_module, "_AGE_S", 0.0)

    def old(number: int, message: pb.FollowResponse) -> bytes:
        if message.HasField("begin"):
            message.begin.lag = 3600
        if message.HasField("heartbeat"):
            message.heartbeat.lag = 3600
        return message.SerializeToString()

    scripted.spoil = [old]
    noted = tmp_path / "follower/follower/current"
    async with scripted.serving(), following(scripted, tmp_path) as (follower, _):
        await until(lambda: follower.standing.connected and noted.exists())
        before = noted.stat().st_ino
        await until(lambda: noted.stat().st_mtime < time.time() - 3000)
        assert noted.stat().st_ino == before
        assert follower.standing.lag_s > 3000
    async with following(scripted, tmp_path) as (follower, mirror):
        assert mirror.resolve("one")
        with refused(Unavailable, cause="registry_lag"):
            follower.standing.check(60)
