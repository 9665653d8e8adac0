"""Weights from the registry's object store: as they should be, or from the registry."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import Unavailable
from veneer_registry.shared.objects import Stat
from veneer_registry.weights_cache import WeightsCache
from veneer_server.follower.fetching import Fetching
from veneer_server.follower.standing import Standing
from veneer_server.follower.store_first import StoreFirst

from tests.shared_services import BUCKET, S3Server
from tests.unit.server.follower.pair import generate, pair
from tests.unit.server.follower.remote import FILES, Remote


class Objects:
    """FAKE: objects in memory, which a test changes."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.claimed: dict[str, int] = {}
        self.before: Callable[[], object] = lambda: None
        self.asked: list[str] = []

    def stat(self, key: str) -> Stat | None:
        self.asked.append(key)
        self.before()
        if key not in self.content:
            return None
        return Stat(self.claimed.get(key, len(self.content[key])), 0.0)

    def read_part(self, key: str, start: int, end: int) -> bytes | None:
        self.before()
        return self.content[key][start:end]


@dataclass
class Kit:
    """What has the weights, and who fetches them."""

    registry: Remote
    objects: Objects
    remote: StoreFirst
    cache: WeightsCache
    fetching: Fetching
    now: list[float]

    def key(self, digest: str, file: str = FILES[1]) -> str:
        return f"weights/{digest}/{file}"

    async def present(self, digest: str) -> None:
        """Fetch, and compare with what was published."""
        assert await self.fetching.present("default", digest)
        for name in FILES:
            found = (self.cache.weights_folder(digest) / name).read_bytes()
            assert found == (self.registry.folders[digest] / name).read_bytes()

    @property
    def from_registry(self) -> set[str]:
        return {digest for digest, _, _ in self.registry.asked}


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    registry, objects, now = Remote(tmp_path), Objects(), [0.0]
    for digest, folder in registry.folders.items():
        for name in FILES:
            objects.content[f"weights/{digest}/{name}"] = (folder / name).read_bytes()
    cache = WeightsCache(tmp_path / "cache", 1 << 30, lambda digest: False)
    cache.open()
    standing = Standing("registry:1")
    standing.current()
    remote = StoreFirst(
        lambda tenant: objects,
        registry,
        most_bytes=1 << 20,
        access_s=0.2,
        clock=lambda: now[0],
    )
    return Kit(
        registry,
        objects,
        remote,
        cache,
        Fetching(cache, remote, standing, patience_s=1.0),
        now,
    )


async def test_the_registry_is_not_asked_for_what_the_store_has(kit: Kit) -> None:
    for digest in kit.registry.digests:
        await kit.present(digest)
    assert not kit.registry.asked
    assert kit.remote.pieces >= 2 * len(kit.registry.digests)


@pytest.mark.parametrize("lie", ["other", "flipped", "config"])
async def test_a_lying_store_is_found_out_by_the_digest(kit: Kit, lie: str) -> None:
    one, two, *_ = kit.registry.digests
    key = kit.key(one, FILES[0] if lie == "config" else FILES[1])
    right = kit.objects.content[key]
    kit.objects.content[key] = {
        "other": kit.objects.content[kit.key(two)],
        "flipped": right[:-1] + bytes([right[-1] ^ 1]),
        "config": right.replace(b'"r": 4', b'"r": 8').replace(b'"r":4', b'"r":8'),
    }[lie]
    assert kit.objects.content[key] != right
    await kit.present(one)
    assert kit.from_registry == {one}
    await kit.present(two)
    assert kit.from_registry == {one}, "only what was wrong comes from elsewhere"


@pytest.mark.parametrize("fault", ["missing", "huge", "short", "longer"])
async def test_an_object_that_cannot_be_it(kit: Kit, fault: str) -> None:
    one = kit.registry.digests[0]
    key = kit.key(one)
    match fault:
        case "missing":
            del kit.objects.content[key]
        case "huge":
            kit.objects.claimed[key] = 1 << 40
        case "short":
            kit.objects.claimed[key] = len(kit.objects.content[key]) + 5
        case "longer":
            kit.objects.content[key] += b"12345"
    await kit.present(one)
    assert kit.from_registry == {one}


async def test_a_store_that_hangs_takes_no_threads_of_others(kit: Kit) -> None:
    one = kit.registry.digests[0]
    answer = threading.Event()
    kit.objects.before = answer.wait
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    try:
        await kit.present(one)
        assert kit.from_registry == {one}
    finally:
        answer.set()


async def test_a_store_that_is_away_is_left_alone_for_a_while(kit: Kit) -> None:
    one, two, three, _ = kit.registry.digests

    def away() -> None:
        raise Unavailable("the store is away")

    kit.objects.before = away
    await kit.present(one)
    await kit.present(two)
    assert (len(kit.objects.asked), kit.from_registry) == (1, {one, two})
    kit.objects.before = lambda: None
    kit.now[0] += 6
    await kit.present(three)
    assert kit.from_registry == {one, two}


async def test_a_store_that_hangs_delays_one_fetch_only(kit: Kit) -> None:
    one, two, *_ = kit.registry.digests
    hung = threading.Event()
    kit.objects.before = lambda: hung.wait(20) and None
    try:
        await kit.present(one)
        await kit.present(two)
    finally:
        hung.set()
    assert (len(kit.objects.asked), kit.from_registry) == (1, {one, two})


@pytest.mark.push
async def test_weights_come_from_a_real_store(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3Server()
    try:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        objects = server.objects("own")
        async with pair(base_folder, front_cache, tmp_path, store=f"s3://{BUCKET}/own") as both:
            size = 0
            for name, seed in (("stored", 1), ("not-stored", 2)):
                pushed = await both.push(name, seed)
                folder = (
                    both.registry.data_dir / "store/weights" / pushed.adapter.weights_digest
                )
                for file in FILES if name == "stored" else ():
                    objects.put(f"weights/{folder.name}/{file}", folder / file)
                    size += (folder / file).stat().st_size
            await both.agreed()
            before = both.proxy.forwarded
            found = await generate(both.follower, "stored")
            assert found.provenance.tier == inference_pb2.TIER_REMOTE
            assert both.proxy.forwarded - before < size
            await generate(both.follower, "not-stored")
    finally:
        server.stop()
