"""Uploads between protobuf and what `serving` takes."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from google.protobuf.descriptor import FieldDescriptor
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_proto.v1 import replication_pb2
from veneer_registry.errors import InvalidField
from veneer_server.replication.replicas import Wait
from veneer_server.rpc.convert import UploadMessages, upload_message, upload_options
from veneer_server.serving.uploads import UploadChunk, UploadMessage, UploadOptions

SHA = "a" * 64


def spec(**fields: object) -> pb.UploadSpec:
    given = {"name": "sql", "files": [pb.UploadFile(name="a", size=3, sha256=SHA)], **fields}
    return pb.UploadSpec(**given)  # type: ignore[arg-type]


def announced(**fields: object) -> pb.UploadAdapterRequest:
    return pb.UploadAdapterRequest(spec=spec(**fields))


CHUNK = pb.UploadAdapterRequest(chunk=pb.UploadChunk(file="a", offset=1, data=b"bc"))
NEITHER = pb.UploadAdapterRequest()


async def read(
    *requests: pb.UploadAdapterRequest,
) -> tuple[list[UploadMessage | InvalidField], Wait]:
    async def sent() -> AsyncIterator[pb.UploadAdapterRequest]:
        for request in requests:
            yield request

    messages = UploadMessages(sent())
    return [message async for message in messages], messages.wait


async def test_options_then_chunks() -> None:
    wait = replication_pb2.WaitForReplicas(replicas=replication_pb2.WAIT_REPLICAS_ALL)
    found, waits = await read(announced(wait=wait, resume=True), CHUNK)
    options, chunk = found
    assert isinstance(options, UploadOptions)
    assert (options.request.name, options.resume) == ("sql", True)
    assert chunk == UploadChunk("a", 1, b"bc")
    assert waits == Wait("all")


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([CHUNK], "spec"),
        ([NEITHER], "spec"),
        ([announced(files=[])], "spec.files"),
        ([announced(labels={f"{n}": "a" for n in range(65)})], "spec.labels"),
        ([announced(validate_only=True, activate=True)], "spec.activate"),
        (
            [announced(wait=replication_pb2.WaitForReplicas(replicas=9))],  # type: ignore[arg-type]
            "spec.wait.replicas",
        ),
        ([announced(), announced()], "chunk"),
        ([announced(), announced(files=[])], "chunk"),
        ([announced(), NEITHER], "chunk"),
    ],
)
async def test_a_refused_message_leaves_the_rest_to_be_read(
    requests: list[pb.UploadAdapterRequest], field: str
) -> None:
    found, _ = await read(*requests, CHUNK)
    *_, error, chunk = found
    assert isinstance(error, InvalidField)
    assert error.metadata["field"] == field
    assert chunk == UploadChunk("a", 1, b"bc")


async def test_no_message_at_all_is_refused() -> None:
    (error,), _ = await read()
    assert isinstance(error, InvalidField)


def test_every_field_goes_there_and_back() -> None:
    """A follower passes on what it has read from a folder: a field that is forgotten would be
    lost there."""
    whole = spec()
    for field in pb.UploadSpec.DESCRIPTOR.fields:
        if field.type == FieldDescriptor.TYPE_BOOL and field.name != "validate_only":
            setattr(whole, field.name, True)
        elif field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            setattr(whole, field.name, SHA)
    whole.labels["team"] = "a"
    given = {field.name for field, _ in whole.ListFields()}
    every = {field.name for field in pb.UploadSpec.DESCRIPTOR.fields}
    assert every - given == {"wait", "validate_only"}
    only = spec(validate_only=True)
    for each in (whole, only):
        assert upload_message(upload_options(each)[0]) == pb.UploadAdapterRequest(spec=each)
    assert upload_message(UploadChunk("a", 1, b"bc")) == CHUNK
