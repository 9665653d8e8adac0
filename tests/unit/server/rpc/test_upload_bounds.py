"""Stalled uploads hold no place and, once interrupted, little disk space."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.errors import QuotaExceeded
from veneer_server.access.edit_keys import add_key
from veneer_server.serving import uploads as uploads
from veneer_server.serving.uploads import (
    MAX_AT_ONCE,
    MIN_RATE,
    WINDOW_S,
    UploadPace,
    UploadPlaces,
)

from tests.fake_clock import in_no_time
from tests.refused import refused
from tests.unit.server.rpc.front_harness import Front, failure, make_adapter, running, until
from tests.unit.server.rpc.front_harness import upload as messages_of

MBIT = 125_000
"""Bytes a second of a line of 1 Mbit/s."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn is over at once."""
    monkeypatch.setattr(uploads, "TURN_S", 0.0)


async def receive(size: int, chunk: int, seconds: float) -> float:
    """Take in so many bytes, a chunk each so many seconds; how long that took."""
    pace, loop = UploadPace(MIN_RATE), asyncio.get_running_loop()
    left = size
    while left > 0:
        await pace.wait(lambda: asyncio.sleep(seconds))
        pace.progressed(min(chunk, left))
        left -= chunk
    return loop.time()


@pytest.mark.parametrize("chunk", [1 << 10, 1 << 20, 4 << 20])
def test_a_slow_line_is_fast_enough(chunk: int) -> None:
    size = 100_000_000
    took = in_no_time(receive(size, chunk, chunk / MBIT))
    assert took == pytest.approx(size / MBIT, rel=0.05)


@pytest.mark.parametrize(("chunk", "seconds"), [(0, 5.0), (1, 1.0), (1 << 10, 1.0)])
def test_one_that_hardly_moves_is_ended_within_the_window(chunk: int, seconds: float) -> None:
    async def ended_after() -> float:
        with pytest.raises(TimeoutError):
            # An empty chunk never gets it done.
            await receive(10_000_000, chunk or 1, seconds) if chunk else await empty(seconds)
        return asyncio.get_running_loop().time()

    assert in_no_time(ended_after()) == pytest.approx(WINDOW_S)


def test_an_upload_ends_by_its_deadline_however_fast_it_comes() -> None:
    """At the lowest rate, 2 GiB took 36 hours."""

    async def ended_after() -> float:
        pace = UploadPace(MIN_RATE, 3600)
        with contextlib.suppress(TimeoutError):
            while not pace.late:
                await pace.wait(lambda: asyncio.sleep(1.1))
                pace.progressed(10 * MIN_RATE, 2 << 30)
        assert pace.late
        return asyncio.get_running_loop().time()

    assert in_no_time(ended_after()) == pytest.approx(3600)


async def empty(seconds: float) -> None:
    pace = UploadPace(MIN_RATE)
    while True:
        await pace.wait(lambda: asyncio.sleep(seconds))
        pace.progressed(0)


def test_whatever_an_upload_does_it_ends_in_time() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    generator = random.Random(seed)
    size = 10_000_000

    async def attempt() -> float:
        pace, left = UploadPace(MIN_RATE), size
        try:
            while left > 0:
                await pace.wait(lambda: asyncio.sleep(generator.uniform(0, 30)))
                came = min(left, generator.choice((0, 1, 1000, 1 << 20)))
                pace.progressed(came)
                left -= came
        except TimeoutError:
            pass
        return asyncio.get_running_loop().time()

    for _ in range(50):
        assert in_no_time(attempt()) <= size / MIN_RATE + WINDOW_S


class Sender:
    """A client that sends what it is told to, when it is told to."""

    def __init__(self, front: Front, messages: list[pb.UploadAdapterRequest]) -> None:
        self._queue: asyncio.Queue[pb.UploadAdapterRequest | None] = asyncio.Queue()
        for message in messages:
            self._queue.put_nowait(message)
        self.call = front.adapters.UploadAdapter(self._requests())

    async def _requests(self) -> AsyncIterator[pb.UploadAdapterRequest]:
        while (message := await self._queue.get()) is not None:
            yield message

    def send(self, message: pb.UploadAdapterRequest | None) -> None:
        self._queue.put_nowait(message)


async def first_ended(senders: list[Sender]) -> Sender:
    """By the server: a message that was being written when a call ended fails in gRPC's client,
    which then says INTERNAL."""
    left = list(senders)
    while True:
        await until(lambda: any(sender.call.done() for sender in left))
        ended = next(sender for sender in left if sender.call.done())
        if await ended.call.code() is not grpc.StatusCode.INTERNAL:
            return ended
        left.remove(ended)


def begun(folder: Path, name: str, **options: Any) -> list[pb.UploadAdapterRequest]:
    """The announcement and the first chunk."""
    return list(messages_of(folder, name, chunk=100, **options))[:2]


def empty_chunk() -> pb.UploadAdapterRequest:
    chunk = pb.UploadChunk(file="adapter_config.json", offset=100)
    return pb.UploadAdapterRequest(chunk=chunk)


def kept(front: Front, tenant: str | None = None) -> list[Path]:
    """Folders of uploads, running or interrupted; of the default tenant if none is named."""
    home = front.data_dir if tenant is None else front.data_dir / "tenants" / tenant
    return sorted((home / "store" / "uploads").glob("*"))


async def test_empty_chunks_do_not_hold_the_places(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients with an empty chunk every 5 s kept all others out for ever."""
    monkeypatch.setattr(uploads, "PATIENCE_S", 0.2)
    adapter = make_adapter(tmp_path / "adapter")
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        senders = [
            Sender(front, begun(adapter, f"held-{n}", resume=True)) for n in range(MAX_AT_ONCE)
        ]
        await until(lambda: len(kept(front)) == MAX_AT_ONCE)

        async def drip() -> None:
            while True:
                for sender in senders:
                    sender.send(empty_chunk())
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        refused = set()
        while True:  # retried as clients do
            try:
                answer = await front.push(adapter, "honest")
                break
            except grpc.aio.AioRpcError as error:
                refused.add(error.code())
        assert answer.published
        assert refused <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
        ended = await first_ended(senders)
        displaced = await failure(ended.call)
        assert displaced.code is grpc.StatusCode.ABORTED
        assert "RetryInfo" in displaced.details
        dripping.cancel()
        for sender in senders:
            sender.call.cancel()
        await until(lambda: len(kept(front)) == MAX_AT_ONCE)
        name = f"held-{senders.index(ended)}"
        again = await front.push(adapter, name, resume=True)
        assert again.published, "what came was kept"


async def test_one_that_will_take_long_gives_its_place_to_another(
    quick: None,
    base_folder: Path,
    front_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Eight that bring just enough held all places for up to 36 hours."""
    monkeypatch.setattr(uploads, "LONG_S", 0.05)
    monkeypatch.setattr(uploads, "PATIENCE_S", 60.0)
    adapter = make_adapter(tmp_path / "adapter")
    flags = {"min_upload_rate": "1"}  # none of them is too slow
    async with running(base_folder, front_cache, tmp_path / "front", **flags) as front:
        senders = [
            Sender(front, begun(adapter, f"held-{n}", resume=True)) for n in range(MAX_AT_ONCE)
        ]
        await until(lambda: len(kept(front)) == MAX_AT_ONCE)
        published = False
        while not published:  # retried as clients do
            with contextlib.suppress(grpc.aio.AioRpcError):
                published = (await front.push(adapter, "honest")).published
        ended = await first_ended(senders)
        assert sum(sender.call.done() for sender in senders) == 1, "one place is enough"
        displaced = await failure(ended.call)
        assert displaced.code is grpc.StatusCode.ABORTED
        assert "RetryInfo" in displaced.details
        for sender in senders:
            sender.call.cancel()
        name = f"held-{senders.index(ended)}"
        assert (await front.push(adapter, name, resume=True)).published, "what came was kept"


async def test_an_upload_past_the_deadline_is_ended_and_kept(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    flags = {"upload_deadline": "0.3"}
    async with running(base_folder, front_cache, tmp_path / "front", **flags) as front:
        sender = Sender(front, begun(adapter, "late", resume=True))
        ended = await failure(sender.call)
        assert ended.code is grpc.StatusCode.ABORTED
        assert "--upload-deadline" in ended.message
        assert "RetryInfo" in ended.details
        await until(lambda: len(kept(front)) == 1)


@pytest.mark.push
async def test_one_that_is_too_large_is_told_before_it_is_sent(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    flags = {"max_adapter_bytes": "1KiB"}
    async with running(base_folder, front_cache, tmp_path / "front", **flags) as front:
        announced = list(messages_of(adapter, "large"))[:1]
        refused = await failure(Sender(front, [*announced]).call)
        assert refused.reason == "ADAPTER_INVALID"


async def test_full_places_are_told_with_a_time_to_retry(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(tmp_path / "adapter")
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        senders = [Sender(front, begun(adapter, f"n-{n}")) for n in range(MAX_AT_ONCE)]
        await until(lambda: len(kept(front)) == MAX_AT_ONCE)
        refused = await failure(front.adapters.UploadAdapter(messages_of(adapter, "late")))
        assert refused.reason == "QUOTA_EXCEEDED"
        assert refused.metadata["limit"] == str(MAX_AT_ONCE)
        assert "RetryInfo" in refused.details
        for sender in senders:
            sender.call.cancel()


async def test_one_that_brings_too_little_is_ended_and_kept(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "WINDOW_S", 0.2)
    adapter = make_adapter(tmp_path / "adapter")
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        sender = Sender(front, begun(adapter, "slow", resume=True))
        ended = await failure(sender.call)
        assert ended.code is grpc.StatusCode.ABORTED
        assert "--min-upload-rate" in ended.message
        await until(lambda: len(kept(front)) == 1)
        assert (await front.push(adapter, "slow", resume=True)).published


@pytest.mark.push
async def test_broken_uploads_are_kept_by_number_and_bytes_the_newest_first(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """Forty broken ones kept 800 MB for a day."""
    adapter = make_adapter(tmp_path / "adapter")
    flags = {"max_broken_uploads": "3", "max_broken_upload_bytes": "1000"}
    async with running(base_folder, front_cache, tmp_path / "front", **flags) as front:
        held = Sender(front, begun(adapter, "being-sent", resume=True))
        await until(lambda: len(kept(front)) == 1)
        (being_sent,) = kept(front)
        for n in range(10):
            before = set(kept(front))
            sender = Sender(front, begun(adapter, f"broken-{n}", resume=True))
            await until(lambda before=before: bool(set(kept(front)) - before))  # type: ignore[misc]
            sender.call.cancel()
            await until(lambda: front.calls == 1)
        assert len(kept(front)) == 4
        assert being_sent in kept(front)
        # Larger than all that may be kept: the newest stays, and can be resumed.
        large = make_adapter(tmp_path / "large", rank=8, seed=1)
        sender = Sender(front, [*list(messages_of(large, "large", resume=True))[:2]])
        for message in list(messages_of(large, "large", chunk=5000))[2:3]:
            sender.send(message)
        await until(
            lambda: any(f.stat().st_size == 5000 for d in kept(front) for f in d.iterdir())
        )
        sender.call.cancel()
        await until(lambda: len(kept(front)) == 2)
        assert being_sent in kept(front)
        assert (await front.push(large, "large", resume=True)).published
        held.call.cancel()


# ------------------------------------------------------------------------ of tenants


def uploading(missing: int = 1000) -> UploadPace:
    """An upload that has so many bytes to come."""
    pace = UploadPace(MIN_RATE)
    pace.progressed(0, missing)
    return pace


async def test_one_tenant_cannot_take_all_places() -> None:
    places = UploadPlaces()
    hog = [uploading(1000 + n) for n in range(MAX_AT_ONCE)]
    for pace in hog:
        places.take("hog", pace)
    with refused(QuotaExceeded, limit=MAX_AT_ONCE):
        places.take("hog", uploading())  # it has its share
    light = [uploading() for _ in range(MAX_AT_ONCE // 2)]
    for pace in light:
        places.take("light", pace)
    assert [pace.displaced for pace in hog] == [False] * 4 + [True] * 4, "most to come first"
    with refused(QuotaExceeded):
        places.take("light", uploading())
    for _ in range(MAX_AT_ONCE // 3):
        places.take("third", uploading())
    assert sum(pace.displaced for pace in (*hog, *light)) == 4 + 2
    with refused(QuotaExceeded):
        places.take("third", uploading())
    for pace in (*hog, *light):
        places.leave(pace)  # a displaced one's place is another's by now
    for _ in range(MAX_AT_ONCE - MAX_AT_ONCE // 3):
        places.take("light", uploading())
    with refused(QuotaExceeded):
        places.take("light", uploading())


async def test_what_is_being_published_keeps_its_place() -> None:
    """All its bytes are there: it ends soon, and taking its place would gain nothing."""
    places = UploadPlaces()
    for _ in range(MAX_AT_ONCE):
        places.take("hog", uploading(missing=0))
    with refused(QuotaExceeded):
        places.take("light", uploading())


async def test_a_tenant_beside_a_hog_uploads(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hog's upload can be resumed."""
    monkeypatch.setattr(uploads, "PATIENCE_S", 60.0)
    folder = make_adapter(tmp_path / "a")
    keys = tmp_path / "keys.toml"
    metadata = {
        tenant: (
            (
                "authorization",
                "Bearer "
                + add_key(
                    keys, name=tenant, tenant=tenant, roles=["publisher"], expires=None
                ).key,
            ),
        )
        for tenant in ("hog", "light")
    }
    async with running(
        base_folder, front_cache, tmp_path / "front", keys_file=str(keys)
    ) as front:
        calls = []
        for n in range(MAX_AT_ONCE):
            spec, chunk, *_ = messages_of(folder, f"hog-{n}", chunk=100)
            call: Any = front.adapters.UploadAdapter(metadata=metadata["hog"])
            await call.write(spec)
            await call.write(chunk)
            calls.append(call)
        # A running call has no place yet while its key is verified.
        await until(lambda: len(kept(front, "hog")) == MAX_AT_ONCE)
        told = await failure(
            front.adapters.UploadAdapter(messages_of(folder, "more"), metadata=metadata["hog"])
        )
        assert told.reason == "QUOTA_EXCEEDED"
        pushed = await front.adapters.UploadAdapter(
            messages_of(folder, "mine"), metadata=metadata["light"]
        )
        assert pushed.published
        done, _ = await asyncio.wait(
            [asyncio.ensure_future(_outcome(call)) for call in calls],
            return_when=asyncio.FIRST_COMPLETED,
        )
        assert {each.result() for each in done} == {(grpc.StatusCode.ABORTED, "displaced")}
        for call in calls:
            call.cancel()
        again = await front.adapters.UploadAdapter(
            messages_of(folder, "hog-0", resume=True), metadata=metadata["hog"]
        )
        assert again.published


async def _outcome(call: Any) -> tuple[grpc.StatusCode, str]:
    told = await failure(call)
    return told.code, told.metadata["cause"]
