"""What a registry gets of publications with ``activate``. No Ray is needed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from veneer_proto.v1 import adapters_pb2, replication_pb2
from veneer_ray.publication import PublishRequest

ALL = replication_pb2.WAIT_REPLICAS_ALL


async def upload(**spec: Any) -> AsyncIterator[adapters_pb2.UploadAdapterRequest]:
    yield adapters_pb2.UploadAdapterRequest(spec=adapters_pb2.UploadSpec(name="chat", **spec))
    yield adapters_pb2.UploadAdapterRequest(
        chunk=adapters_pb2.UploadChunk(file="adapter_config.json", data=b"{}")
    )


async def test_an_upload_is_published_everywhere_and_loaded_afterwards() -> None:
    made = PublishRequest(upload(activate=True, allow_replace=True))
    messages = [message async for message in made.request]
    spec = messages[0].spec
    assert made.loads
    assert (spec.activate, spec.allow_replace, spec.wait.replicas) == (False, True, ALL)
    assert messages[1].chunk.data == b"{}", "the rest is as it was sent"


async def test_without_activate_nothing_is_changed() -> None:
    for more in ({}, {"activate": True, "validate_only": True}):
        made = PublishRequest(upload(**more))
        messages = [message async for message in made.request]
        assert not made.loads
        assert messages == [message async for message in upload(**more)]


def test_a_registration_waits_as_its_caller_says() -> None:
    wait = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_QUORUM)
    asked = adapters_pb2.RegisterAdapterRequest(name="chat", activate=True, wait=wait)
    made = PublishRequest(asked)
    assert made.loads
    assert not made.request.activate
    assert made.request.wait == wait
