"""A follower's disk cache, and how weights come into it."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.errors import (
    AdapterNotFound,
    DiskFull,
    InvalidField,
    QueueFull,
    Unavailable,
)
from veneer_registry.weights_cache import WeightsCache
from veneer_server.follower.fetching import Fetching
from veneer_server.follower.standing import Standing

from tests.refused import refused
from tests.unit.server.follower.remote import CHUNK, FILES, Remote


class Kit:
    """A cache with room for two adapters, and what fills it."""

    def __init__(self, tmp: Path) -> None:
        self.remote = Remote(tmp)
        self.used: set[str] = set()
        self.in_memory: set[str] = set()
        self.standing = Standing("registry:1")
        self.standing.current()
        self.root = tmp / "cache"
        self.most = int(2.5 * self.remote.size(self.remote.digests[0]))
        self.start()

    def start(self) -> None:
        """As a start of the server does."""
        self.cache = WeightsCache(
            self.root, self.most, self.used.__contains__, self.in_memory.__contains__
        )
        self.cache.open()
        self.fetching = Fetching(self.cache, self.remote, self.standing, patience_s=0.5)

    async def present(self, digest: str) -> bool:
        return await self.fetching.present("default", digest)

    def whole(self, digest: str) -> bool:
        folder = self.cache.weights_folder(digest)
        there = self.remote.folders[digest]
        return all((folder / n).read_bytes() == (there / n).read_bytes() for n in FILES)


@pytest.fixture
def kit(tmp_path: Path) -> Kit:
    return Kit(tmp_path)


async def test_the_least_recently_used_goes_and_never_what_is_leased(kit: Kit) -> None:
    one, two, three, four = kit.remote.digests
    for digest in (one, two):
        assert await kit.present(digest)
    assert not await kit.present(one)  # now `two` is the older one
    assert await kit.present(three)
    assert (one in kit.cache, two in kit.cache, three in kit.cache) == (True, False, True)
    assert not kit.cache.weights_folder(two).exists()
    kit.used |= {one, three}
    with refused(QueueFull, cause="adapter_cache"):
        await kit.present(four)
    kit.used.discard(one)
    assert await kit.present(four)
    assert one not in kit.cache
    assert kit.cache.bytes <= kit.most


async def test_what_is_in_memory_goes_last_but_keeps_nothing_new_out(kit: Kit) -> None:
    one, two, three, four = kit.remote.digests
    for digest in (one, two):
        await kit.present(digest)
    kit.in_memory |= {one}
    assert await kit.present(three)
    assert (one in kit.cache, two in kit.cache, three in kit.cache) == (True, False, True)
    kit.in_memory |= {three}
    assert await kit.present(four)
    assert (one in kit.cache, three in kit.cache, four in kit.cache) == (False, True, True)


async def test_a_disk_with_less_room_than_the_cache_may_take(
    kit: Kit, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two, three, _ = kit.remote.digests
    await kit.present(one)
    await kit.present(two)
    kit.used |= {two}
    pwrite = os.pwrite

    def full(*arguments: Any) -> int:
        if one in kit.cache:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        kit.cache.most_bytes *= 2
        assert await kit.present(three)
        assert kit.whole(three)
        kit.used |= {one, three}
        await kit.present(one)  # room again: it was not in the cache
        with refused(DiskFull):
            await kit.present(kit.remote.digests[3])


async def test_what_is_larger_than_the_cache_is_refused(kit: Kit) -> None:
    kit.cache.most_bytes = 100
    with refused(InvalidField, field="adapter"):
        await kit.present(kit.remote.digests[0])


async def test_order_and_content_survive_a_restart(kit: Kit) -> None:
    one, two, three, _ = kit.remote.digests
    await kit.present(one)
    await kit.present(two)
    kit.start()
    asked = len(kit.remote.asked)
    assert not await kit.present(one)
    assert not await kit.present(two)
    assert len(kit.remote.asked) == asked
    await kit.present(three)
    assert one not in kit.cache


@pytest.mark.parametrize("damage", ["torn", "zeros", "missing", "empty folder"])
async def test_damage_from_an_earlier_run_is_noticed(kit: Kit, damage: str) -> None:
    digest = kit.remote.digests[0]
    await kit.present(digest)
    file = kit.cache.weights_folder(digest) / FILES[1]
    match damage:
        case "torn":
            file.write_bytes(file.read_bytes()[:-1])
        case "zeros":
            file.write_bytes(file.read_bytes()[:-50] + bytes(50))
        case "missing":
            file.unlink()
        case _:
            shutil.rmtree(file.parent)
            file.parent.mkdir()
    kit.start()
    assert await kit.present(digest)
    assert kit.whole(digest)


async def test_a_broken_transfer_resumes_where_it_was(kit: Kit) -> None:
    digest = kit.remote.digests[0]
    kit.remote.break_after = 3 * CHUNK
    assert await kit.present(digest)
    assert kit.whole(digest)
    offsets = [offset for _, file, offset in kit.remote.asked if file == FILES[1]]
    assert offsets == [0, 3 * CHUNK]


async def test_a_kill_in_the_middle_resumes_after_the_start(kit: Kit) -> None:
    digest = kit.remote.digests[0]
    kit.remote.break_after = 2 * CHUNK
    kit.standing.cut()
    kit.fetching = Fetching(kit.cache, kit.remote, kit.standing, patience_s=-1)
    with refused(Unavailable, cause="registry_away"):
        await kit.present(digest)
    kit.start()
    assert await kit.present(digest)
    assert kit.whole(digest)
    assert kit.remote.asked[-1] == (digest, FILES[1], 2 * CHUNK)


async def test_a_damaged_chunk_is_asked_for_again(kit: Kit) -> None:
    digest = kit.remote.digests[0]
    kit.remote.spoil_next = True
    assert await kit.present(digest)
    assert kit.whole(digest)


async def test_another_content_left_half_way_is_begun_anew(kit: Kit) -> None:
    digest = kit.remote.digests[0]
    partial = kit.cache.partial_folder(digest)
    partial.mkdir()
    (partial / FILES[1]).write_bytes(random.Random(1).randbytes(CHUNK))
    assert await kit.present(digest)
    assert kit.whole(digest)
    digest = kit.remote.digests[1]
    partial = kit.cache.partial_folder(digest)
    partial.mkdir()
    (partial / FILES[1]).write_bytes(bytes(1 << 20))  # more than it has
    assert await kit.present(digest)
    assert kit.whole(digest)


async def test_one_fetch_for_all_and_none_waits_for_another(kit: Kit) -> None:
    slow, quick = kit.remote.digests[:2]
    kit.remote.gates[slow] = asyncio.Event()
    waiting = [asyncio.ensure_future(kit.present(slow)) for _ in range(5)]
    await asyncio.sleep(0)
    assert await kit.present(quick)
    waiting[0].cancel()  # takes it from nobody else
    kit.remote.gates[slow].set()
    assert await asyncio.gather(*waiting[1:]) == [True] * 4
    assert len([each for each in kit.remote.asked if each[:2] == (slow, FILES[0])]) == 1


async def test_what_the_registry_says_is_passed_on(kit: Kit) -> None:
    with refused(AdapterNotFound):
        await kit.present("e" * 64)
    assert kit.fetching.failed == 1
    assert kit.fetching.running == 0
