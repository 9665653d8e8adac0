"""Reflection under both names, as programs use it that have none of our stubs."""

from __future__ import annotations

import asyncio
import json
import sys
from base64 import b64decode
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from google.rpc import error_details_pb2
from grpc_reflection.v1alpha import reflection_pb2
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2
from veneer_server.rpc.server_service import SERVICES
from veneer_server.rpc.transport.channel import REFLECTION

from tests.unit.server.rpc.front_harness import Front, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUF = Path(sys.executable).with_name("buf")
GENERATE = "/veneer.v1.InferenceService/Generate"
WRONG = prompt(sampling=inference_pb2.SamplingOptions(top_p=3))
DETAILS = (
    "BadRequest",
    "ErrorInfo",
    "PreconditionFailure",
    "QuotaFailure",
    "ResourceInfo",
    "RetryInfo",
)


class Stranger:
    """Knows what reflection told it, and nothing else."""

    def __init__(self, front: Front, service: str) -> None:
        self._ask = front.channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self.pool = descriptor_pool.DescriptorPool()
        self._files: set[str] = set()

    async def ask(self, **wanted: str) -> Any:
        call: Any = self._ask(iter([reflection_pb2.ServerReflectionRequest(**wanted)]))
        (answer,) = [one async for one in call]
        return answer

    async def kind(self, name: str) -> type[Any]:
        """The class of a message, from its full name."""
        answer = await self.ask(file_containing_symbol=name)
        files: dict[str, Any] = {}
        for data in answer.file_descriptor_response.file_descriptor_proto:
            file = descriptor_pb2.FileDescriptorProto.FromString(data)
            files[file.name] = file
        for name_of_file in files:
            self._add(files, name_of_file)
        return message_factory.GetMessageClass(self.pool.FindMessageTypeByName(name))

    def _add(self, files: dict[str, Any], name: str) -> None:
        if name in self._files:
            return
        self._files.add(name)
        for needed in files[name].dependency:
            self._add(files, needed)
        self.pool.AddSerializedFile(files[name].SerializeToString())


@pytest.fixture(params=REFLECTION)
def service(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def test_it_lists_the_services_and_itself(front: Front, service: str) -> None:
    answer = await Stranger(front, service).ask(list_services="")
    names = [one.name for one in answer.list_services_response.service]
    assert names == sorted([*SERVICES, "grpc.health.v1.Health", *REFLECTION])


async def test_every_service_can_be_described(front: Front, service: str) -> None:
    stranger = Stranger(front, service)
    for name in (*SERVICES, "grpc.health.v1.Health", *REFLECTION):
        answer = await stranger.ask(file_containing_symbol=name)
        assert answer.file_descriptor_response.file_descriptor_proto, name


async def test_a_name_that_is_not_there(front: Front, service: str) -> None:
    answer = await Stranger(front, service).ask(file_containing_symbol="veneer.v1.Nothing")
    assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]


async def test_its_messages_are_those_it_describes(front: Front, service: str) -> None:
    """A client that was generated from the name's own .proto understands the answers."""
    package = service.rpartition(".")[0]
    stranger = Stranger(front, service)
    request = (await stranger.kind(f"{package}.ServerReflectionRequest"))()
    response = await stranger.kind(f"{package}.ServerReflectionResponse")
    request.list_services = "*"
    call: Any = front.channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=response.FromString,
    )(iter([request]))
    (answer,) = [one async for one in call]
    assert answer.original_request == request
    assert SERVICES[0] in {one.name for one in answer.list_services_response.service}


async def test_an_errors_details_are_read_by_reflection_alone(
    front: Front, service: str
) -> None:
    stranger = Stranger(front, service)
    call: Any = front.channel.unary_unary(GENERATE)(WRONG.SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    metadata = caught.value.trailing_metadata()
    assert metadata is not None
    data = dict(metadata)["grpc-status-details-bin"]
    status = (await stranger.kind("google.rpc.Status")).FromString(data)
    found = {}
    for detail in status.details:
        kind = detail.type_url.rpartition("/")[2]
        shown = (await stranger.kind(kind)).FromString(detail.value)
        found[kind] = json_format.MessageToDict(shown)
    assert found["google.rpc.ErrorInfo"]["reason"] == "INVALID_FIELD"
    (violation,) = found["google.rpc.BadRequest"]["fieldViolations"]
    assert violation["field"] == "sampling.top_p"


async def test_every_kind_of_detail_is_found(front: Front, service: str) -> None:
    stranger = Stranger(front, service)
    for name in DETAILS:
        assert (await stranger.kind(f"google.rpc.{name}")).DESCRIPTOR.fields


async def test_the_contract_is_the_one_that_is_served(front: Front, service: str) -> None:
    stranger = Stranger(front, service)
    for file in (adapters_pb2, inference_pb2, server_pb2):
        answer = await stranger.ask(file_by_filename=file.DESCRIPTOR.name)
        first = answer.file_descriptor_response.file_descriptor_proto[0]
        assert first == file.DESCRIPTOR.serialized_pb


# ----------------------------------------------------------------- a program of others


async def curl(front: Front, kind: str, body: dict[str, Any]) -> tuple[int, str, str]:
    """`buf curl`, which knows nothing but the address."""
    process = await asyncio.create_subprocess_exec(
        str(BUF),
        "curl",
        "--protocol",
        "grpc",
        "--http2-prior-knowledge",
        *("--reflect-protocol", kind, "--data", json.dumps(body)),
        f"http://{front.addresses['grpc']}{GENERATE}",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.parametrize("kind", ["grpc-v1", "grpc-v1alpha"])
async def test_buf_curl_calls_and_shows_an_errors_details(front: Front, kind: str) -> None:
    """It decodes no details but those that it was built with; grpcurl asks reflection."""
    if not BUF.exists():
        pytest.skip("buf is not installed: install the extra `dev`")
    code, out, err = await curl(front, kind, {"prompt": "Hi", "stopping": {"maxTokens": 2}})
    assert code == 0, err
    assert json.loads(out)["usage"]["completionTokens"] == 2
    code, out, err = await curl(front, kind, {"prompt": "Hi", "sampling": {"topP": 3}})
    assert code != 0
    error = json.loads(err)
    assert error["code"] == "invalid_argument"
    shown = {one["type"]: b64decode(one["value"] + "==") for one in error["details"]}
    info = error_details_pb2.ErrorInfo.FromString(shown["google.rpc.ErrorInfo"])
    assert info.reason == "INVALID_FIELD"
    assert "google.rpc.BadRequest" in shown
