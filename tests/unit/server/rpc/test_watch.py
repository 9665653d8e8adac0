"""WatchAdapters: the event log by itself, and over a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import Aborted, Draining
from veneer_server.rpc.adapter_service import EventWatch
from veneer_server.serving.events import WOKEN, AdapterEvents, WeightsState
from veneer_server.wire.messages import (
    AdapterFailed,
    AdapterLoaded,
    Evicted,
    ResidencyChanged,
    StepDone,
    WireError,
)

from tests.refused import refused
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

DIGEST = "d" * 64


def state(tier: Any, *, pinned: bool = False) -> ResidencyChanged:
    return ResidencyChanged(DIGEST, tier, pinned, 10, 10, 10, 1, 1)


async def told(events: AdapterEvents, *frame: Any) -> list[tuple[str, Tier, bool, str]]:
    """What one frame of the engine's messages became."""
    since = events.last
    for message in frame:
        events.on_engine_event(message)
    await asyncio.sleep(0)
    happened = events.after(since)
    assert happened is not None
    found: list[tuple[str, Tier, bool, str]] = []
    for event in happened:
        assert isinstance(event.subject, WeightsState)
        found.append((event.kind, event.subject.tier, event.subject.pinned, event.detail))
    return found


async def test_frames_become_events() -> None:
    events = AdapterEvents()
    assert await told(events, StepDone(1, 0.1, 0, 1, 1)) == []
    assert await told(events, state("disk")) == []
    assert await told(events, state("host"), AdapterLoaded(DIGEST, "disk", {})) == [
        ("loaded", Tier.HOST, False, "")
    ]
    activated = state("device"), AdapterLoaded(DIGEST, "host", {})
    assert await told(events, *activated) == [("activated", Tier.DEVICE, False, "")]
    assert await told(events, state("device")) == []
    assert await told(events, state("device", pinned=True)) == [
        ("pinned", Tier.DEVICE, True, "")
    ]
    evicted = Evicted(DIGEST, "device", "capacity")
    assert await told(events, state("host"), evicted) == [
        ("evicted", Tier.HOST, False, "capacity"),
        ("unpinned", Tier.HOST, False, ""),
    ]
    both = Evicted(DIGEST, "device", "admin"), Evicted(DIGEST, "host", "admin")
    assert await told(events, state("disk"), *both) == [("evicted", Tier.DISK, False, "admin")]
    broken = AdapterFailed(DIGEST, WireError("ADAPTER_CORRUPT", "push it again", {}))
    assert await told(events, state("disk"), broken) == [
        ("failed", Tier.DISK, False, "push it again")
    ]


async def test_an_engine_that_ended_evicts_without_a_message() -> None:
    events = AdapterEvents()
    await told(events, state("device"), AdapterLoaded(DIGEST, "disk", {}))
    assert await told(events, state("disk")) == [("evicted", Tier.DISK, False, "engine_ended")]


async def test_numbers_are_resumed_from_exactly_or_not_at_all() -> None:
    now = 1_000.0
    events = AdapterEvents(kept=3, clock=lambda: now)
    first = events.last
    assert events.after(first) == ()
    assert events.after(0) is None, "never seen"
    assert events.after(first - 1) is None, "another run"
    assert events.after(first + 1) is None, "not happened"
    for tier in ("host", "device", "host", "device", "host"):
        await told(events, state(tier), Evicted(DIGEST, "host", "admin"))
    assert events.last == first + 5
    for place in (first + 2, first + 3, first + 5):
        happened = events.after(place)
        assert happened is not None
        assert [e.sequence for e in happened] == list(range(place + 1, first + 6))
    assert events.after(first + 1) is None, "too old"
    now += 0.001
    assert AdapterEvents(clock=lambda: now).last > events.last


class Watcher:
    """A WatchAdapters call, read event by event."""

    def __init__(self, front: Front, since: int = 0) -> None:
        self.call = front.adapters.WatchAdapters(pb.WatchAdaptersRequest(since_sequence=since))
        self.sequence = since

    async def next(self) -> tuple[str, str, Any]:
        message = await self.call.read()
        assert message is not grpc.aio.EOF
        self.sequence = message.sequence or self.sequence
        assert message.time.seconds > 1_600_000_000
        kind = pb.AdapterEvent.Name(message.event).removeprefix("ADAPTER_EVENT_")
        return kind, message.adapter.name, message

    async def brief(self, count: int) -> list[tuple[str, str]]:
        return [(await self.next())[:2] for _ in range(count)]

    async def to_present(self) -> list[tuple[str, str]]:
        """What comes up to and with SYNCED."""
        seen = []
        while not seen or seen[-1][0] != "SYNCED":
            seen += await self.brief(1)
        return seen


async def test_a_life_as_it_happens(front: Front, tmp_path: Path) -> None:
    watcher = Watcher(front)
    assert await watcher.to_present() == [("RESET", ""), ("SYNCED", "")]
    one = (await front.push(make_adapter(tmp_path / "a", seed=1), "style")).adapter
    two = make_adapter(tmp_path / "b", seed=2)
    await front.push(two, "style", allow_replace=True)
    await front.push(two, "style")  # the same content: nothing happens
    await front.push(two, "other", validate_only=True)
    await front.adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="style", pin=True))
    await front.adapters.EvictAdapter(pb.EvictAdapterRequest(name="style", unpin=True))
    await front.adapters.DeleteAdapter(pb.DeleteAdapterRequest(name="style"))
    seen = [await watcher.next() for _ in range(8)]
    assert [kind for kind, _, _ in seen] == [
        "PUBLISHED",
        "REPLACED",
        "ACTIVATED",
        "PINNED",
        "EVICTED",
        "UNPINNED",
        "DELETED",
        "DELETED",
    ]
    assert {name for _, name, _ in seen} == {"style"}
    published, replaced, activated = (message for _, _, message in seen[:3])
    assert published.adapter.revision == one.revision != replaced.adapter.revision
    assert activated.adapter.tier == inference_pb2.TIER_DEVICE
    assert {m.adapter.revision for _, _, m in seen[-2:]} == {
        one.revision,
        replaced.adapter.revision,
    }
    assert not any(message.adapter.current for _, _, message in seen[-2:])
    numbers = [message.sequence for _, _, message in seen]
    assert numbers == sorted(set(numbers))


async def test_a_watcher_resumes_where_it_was(front: Front, tmp_path: Path) -> None:
    watcher = Watcher(front)
    await watcher.to_present()
    await front.push(make_adapter(tmp_path / "a", seed=1), "one")
    assert await watcher.brief(1) == [("PUBLISHED", "one")]
    watcher.call.cancel()
    await front.push(make_adapter(tmp_path / "b", seed=2), "two")
    again = Watcher(front, watcher.sequence)
    assert await again.to_present() == [("PUBLISHED", "two"), ("SYNCED", "")]
    unknown = Watcher(front, watcher.sequence + 1000)
    assert await unknown.to_present() == [
        ("RESET", ""),
        ("PRESENT", "one"),
        ("PRESENT", "two"),
        ("SYNCED", ""),
    ]
    assert unknown.sequence == again.sequence


async def test_names_that_share_weights_are_all_told(front: Front, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    await front.push(folder, "one")
    await front.push(folder, "two")
    watcher = Watcher(front)
    await watcher.to_present()
    await front.adapters.ActivateAdapter(pb.ActivateAdapterRequest(name="one"))
    _, first, half = await watcher.next()
    _, second, whole = await watcher.next()
    assert (first, second) == ("one", "two")
    assert (half.sequence, bool(whole.sequence)) == (0, True)


async def test_a_drain_ends_watches_at_once(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path, grace="3600") as front:
        watcher = Watcher(front)
        await watcher.to_present()
        front.app.stop()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await watcher.next()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await front.task


class Nobody:
    """No adapters, no registry: for watches that are about the row only."""

    def list(self, **_: Any) -> tuple[()]:
        return ()

    def holding(self, digest: str) -> tuple[()]:
        return ()


def lonely_watch(events: AdapterEvents, **limits: float) -> EventWatch:
    return EventWatch(Nobody(), None, events, **limits)  # type: ignore[arg-type]


async def test_who_falls_behind_is_closed() -> None:
    events = AdapterEvents(kept=2)
    gate = asyncio.Event()

    async def write(data: bytes) -> None:
        message = pb.WatchAdaptersResponse.FromString(data)
        if message.event == pb.ADAPTER_EVENT_SYNCED:
            for tier in ("host", "device", "host"):
                await told(events, state(tier), Evicted(DIGEST, "host", "admin"))
            gate.set()

    with refused(Aborted, cause="fell_behind"):
        await lonely_watch(events).serve(0, write)
    assert gate.is_set()


async def test_what_happens_during_the_snapshot_follows_it() -> None:
    events, seen = AdapterEvents(), []

    async def write(data: bytes) -> None:
        message = pb.WatchAdaptersResponse.FromString(data)
        seen.append((message.event, message.sequence - events.last))
        if message.event == pb.ADAPTER_EVENT_RESET:
            await told(events, state("host"), AdapterLoaded(DIGEST, "disk", {}))
            events.close()

    class Someone(Nobody):
        def holding(self, digest: str) -> Any:
            return ("a record",)

    view = SimpleNamespace(adapter=lambda record: pb.Adapter(name=record))
    watch = EventWatch(Someone(), view, events)  # type: ignore[arg-type]
    with pytest.raises(Draining):
        await watch.serve(0, write)
    assert seen[1:] == [(pb.ADAPTER_EVENT_LOADED, 0), (pb.ADAPTER_EVENT_SYNCED, 0)]


async def test_what_happened_to_weights_is_not_told_of_a_name_that_came_later() -> None:
    """As seen on a busy machine: one that was activated for its own publication was told
    ACTIVATED, PUBLISHED, ACTIVATED."""
    events, seen = AdapterEvents(), []
    since = events.last
    events.name_by(lambda digest: ("old",))
    await told(events, state("device"), AdapterLoaded(DIGEST, "host", {}))
    events.name_by(lambda digest: ("old", "new"))
    await told(events, state("host"), Evicted(DIGEST, "device", "admin"))
    events.close()

    async def write(data: bytes) -> None:
        message = pb.WatchAdaptersResponse.FromString(data)
        if message.event != pb.ADAPTER_EVENT_SYNCED:
            seen.append((message.event, message.adapter.name))

    class Both(Nobody):
        def holding(self, digest: str) -> Any:
            return tuple(
                SimpleNamespace(ref=SimpleNamespace(name=name)) for name in ("old", "new")
            )

    view = SimpleNamespace(adapter=lambda record: pb.Adapter(name=record.ref.name))
    with pytest.raises(Draining):
        await EventWatch(Both(), view, events).serve(since, write)  # type: ignore[arg-type]
    assert seen == [
        (pb.ADAPTER_EVENT_ACTIVATED, "old"),
        (pb.ADAPTER_EVENT_EVICTED, "old"),
        (pb.ADAPTER_EVENT_EVICTED, "new"),
    ]


async def test_who_stops_reading_is_closed() -> None:
    async def write(data: bytes) -> None:
        await asyncio.Event().wait()

    with refused(Aborted, cause="reader_limit"):
        await lonely_watch(AdapterEvents(), reader_limit_s=0.01).serve(0, write)


async def test_what_happened_before_the_end_is_told_before_it() -> None:
    events = AdapterEvents()
    since = events.last
    await told(events, state("host"), AdapterLoaded(DIGEST, "disk", {}))
    events.close()
    seen = []

    async def write(data: bytes) -> None:
        message = pb.WatchAdaptersResponse.FromString(data)
        seen.append(message.event)

    with pytest.raises(Draining):
        await lonely_watch(events).serve(since, write)
    assert seen == [pb.ADAPTER_EVENT_SYNCED]


async def test_one_that_is_activated_before_it_is_published_is_told_in_that_order(
    front: Front, tmp_path: Path
) -> None:
    watcher = Watcher(front)
    await watcher.to_present()
    await front.push(make_adapter(tmp_path / "a"), "one", activate=True)
    kinds = [(await watcher.next())[:2] for _ in range(2)]
    assert kinds == [("PUBLISHED", "one"), ("ACTIVATED", "one")]


async def test_an_event_is_built_once_however_many_watch() -> None:
    """Five thousand watchers, each with messages of its own, stalled the loop for 2 s."""
    events, asked, seen = AdapterEvents(), [], []
    since = events.last

    class Someone(Nobody):
        def holding(self, digest: str) -> Any:
            asked.append(digest)
            return ("a record",)

    async def write(data: bytes) -> None:
        seen.append(pb.WatchAdaptersResponse.FromString(data).event)

    view = SimpleNamespace(adapter=lambda record: pb.Adapter(name=record))
    watch = EventWatch(Someone(), view, events)  # type: ignore[arg-type]
    watchers = [asyncio.create_task(watch.serve(since, write)) for _ in range(200)]
    await asyncio.sleep(0)
    await told(events, state("host"), AdapterLoaded(DIGEST, "disk", {}))
    events.close()
    ended = await asyncio.gather(*watchers, return_exceptions=True)
    assert all(isinstance(error, Draining) for error in ended)
    assert seen.count(pb.ADAPTER_EVENT_LOADED) == 200
    assert len(asked) == 1


async def test_a_build_that_fails_is_tried_again_for_the_next() -> None:
    events, answers = AdapterEvents(), [OSError("the disk"), ("a record",)]
    since = events.last
    await told(events, state("host"), AdapterLoaded(DIGEST, "disk", {}))
    events.close()

    class Sometimes(Nobody):
        def holding(self, digest: str) -> Any:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    async def write(data: bytes) -> None:
        pass

    view = SimpleNamespace(adapter=lambda record: pb.Adapter(name=record))
    watch = EventWatch(Sometimes(), view, events)  # type: ignore[arg-type]
    for error in (OSError, Draining):
        with pytest.raises(error):
            await watch.serve(since, write)


async def test_many_watchers_are_told_some_at_a_time() -> None:
    """What else the loop does has its turn in between."""
    events = AdapterEvents()
    told_now, most = 0, 0

    async def wait() -> None:
        nonlocal told_now
        await events.beyond(events.last)
        told_now += 1

    waiting = [asyncio.create_task(wait()) for _ in range(500)]
    await asyncio.sleep(0)
    events.on_engine_event(state("host"))
    while not all(task.done() for task in waiting):
        before = told_now
        await asyncio.sleep(0)
        most = max(most, told_now - before)
    assert told_now == 500
    assert most <= WOKEN
