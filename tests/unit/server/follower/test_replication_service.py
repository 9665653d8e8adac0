"""What a registry answers followers that ask for what it cannot give."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from veneer_proto.v1 import replication_pb2
from veneer_registry.errors import (
    AdapterCorrupt,
    AdapterNotFound,
    InvalidField,
    Unavailable,
)
from veneer_registry.registry import Registry
from veneer_server.replication.feed import Feed
from veneer_server.replication.replicas import Replicas
from veneer_server.rpc.replication_service import ReplicationService

from tests.refused import refused
from tests.shared_services import running
from tests.unit.registry.kit import BASE, make_adapter, push


class Context:
    """Takes what is written."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    async def write(self, message: Any) -> None:
        self.written.append(message)


@pytest.fixture
def registry(tmp_path: Path) -> Any:
    with Registry.open(tmp_path / "data", BASE) as found:
        push(found, "one", make_adapter(tmp_path / "one"))
        yield found


def service_of(registry: Registry, *, kept: int = 64) -> tuple[ReplicationService, Feed]:
    feed = Feed(kept=kept)
    feed.add("default", registry)
    found = {"default": registry}
    return ReplicationService(feed, Replicas(), found.get, heartbeat_s=0.01), feed


def fetching(registry: Registry, **fields: Any) -> replication_pb2.FetchWeightsRequest:
    digest = registry.get("one").ref.weights_digest
    wanted = {
        "tenant": "default",
        "weights_digest": digest,
        "file": "adapter_model.safetensors",
        **fields,
    }
    return replication_pb2.FetchWeightsRequest(**wanted)


async def test_fetches_that_cannot_be_answered(registry: Registry) -> None:
    service, _ = service_of(registry)
    for field, value in (("file", "../../catalog.sqlite"), ("file", "")):
        with refused(InvalidField, field="file"):
            await service.FetchWeights(fetching(registry, **{field: value}), Context())
    for fields in ({"tenant": "nobody"}, {"weights_digest": "e" * 64}, {"weights_digest": ""}):
        with refused(AdapterNotFound):
            await service.FetchWeights(fetching(registry, **fields), Context())
    for offset in (1 << 40, (1 << 64) - 1):
        beyond = Context()
        await service.FetchWeights(fetching(registry, offset=offset), beyond)
        (only,) = beyond.written
        assert (only.offset, only.data) == (offset, b"")
    registry.quarantine(registry.get("one").ref.weights_digest, "a bit has flipped")
    with refused(AdapterCorrupt, why="a bit has flipped"):
        await service.FetchWeights(fetching(registry), Context())


async def requests(*messages: Any) -> AsyncIterator[Any]:
    for message in messages:
        yield message
    await asyncio.Event().wait()


def start(**fields: Any) -> replication_pb2.FollowRequest:
    return replication_pb2.FollowRequest(start=replication_pb2.FollowStart(**fields))


async def test_a_follower_must_say_who_it_is_and_then_only_what_it_has(
    registry: Registry,
) -> None:
    service, _ = service_of(registry)
    with refused(InvalidField, field="message"):
        await service.Follow(requests(replication_pb2.FollowRequest()), Context())
    for name in ("", "x" * 129):
        with refused(InvalidField, field="start.follower"):
            await service.Follow(requests(start(follower=name)), Context())
    twice = requests(start(follower="a"), start(follower="a"))
    with refused(InvalidField, field="message"):
        await service.Follow(twice, Context())


@pytest.mark.parametrize("run", ["", "another", "own"])
@pytest.mark.parametrize("sequence", [0, 1, 1 << 40])
async def test_only_a_place_of_this_run_is_gone_on_from(
    registry: Registry, run: str, sequence: int
) -> None:
    service, feed = service_of(registry)
    context = Context()
    place = {"run": feed.run if run == "own" else run, "sequence": sequence}
    following = asyncio.ensure_future(
        service.Follow(requests(start(follower="a", **place)), context)
    )
    while not any(each.HasField("heartbeat") for each in context.written):  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    following.cancel()
    kinds = [each.WhichOneof("message") for each in context.written]
    known = run == "own" and sequence <= 1
    assert context.written[0].begin.snapshot is not known
    if not known:
        assert kinds[:4] == ["begin", "state", "snapshot_end", "heartbeat"]
    elif sequence == 1:
        assert kinds[:2] == ["begin", "heartbeat"]
    else:
        assert kinds[:3] == ["begin", "state", "heartbeat"]


@pytest.mark.push
async def test_weights_that_only_the_object_store_has_are_fetched(tmp_path: Path) -> None:
    """Pushed at another registry on the same store. A store that is away is no absence."""
    with running() as services:

        def opened(folder: str) -> Registry:
            places = services.places("own", tmp_path / folder, cache_bytes=1 << 30)
            return Registry.open(tmp_path / folder, BASE, places=places)

        with opened("a") as one:
            ref = push(one, "one", make_adapter(tmp_path / "one")).record.ref
            whole = (one.weights_folder(ref) / "adapter_model.safetensors").read_bytes()
            with opened("b") as other:
                service, _ = service_of(other)
                services.s3.fail(kind="refuse")
                with refused(Unavailable, cause="object_store"):
                    await service.FetchWeights(fetching(other), Context())
                services.s3.fail()
                context = Context()
                await service.FetchWeights(fetching(other), context)
    assert b"".join(each.data for each in context.written) == whole


async def test_a_follower_that_is_behind_gets_no_state_whose_rows_are_gone(
    tmp_path: Path,
) -> None:
    """Revisions were dropped after the changes that it has missed."""
    with Registry.open(tmp_path / "data", BASE) as registry:
        feed = Feed()
        feed.add("default", registry)
        for seed in range(4):
            push(
                registry,
                "one",
                make_adapter(tmp_path / str(seed), seed=seed),
                allow_replace=True,
            )
            registry.update("one", retain=0)
        await asyncio.sleep(0)  # what the registry's changes have scheduled
        changes = feed.after(feed.run, 0)
        assert changes is not None
        assert len(changes) > 4
        for change in changes:
            state = feed.told(change).state
            assert state.entry is not None
            assert {row.revision for row in state.rows} == {
                ref.revision for ref in state.entry.revisions
            }
