"""An error names what its caller can use: a command, an HTTP path, or a gRPC call.

The same errors, through each interface of one front process on real sockets.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from typer.testing import CliRunner
from veneer_client.cli.main import cli
from veneer_proto.v1 import adapters_pb2, inference_pb2

from tests.unit.server.openai.kit import TEXT, error_of, post
from tests.unit.server.rpc.front_harness import Front, make_adapter, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")

OTHERS = {
    "cli": ("/v1/", "ListAdapters", "allow_replace", "sampling.", "stopping.", "output."),
    "http": ("veneer adapter ls", "ListAdapters", "--", "sampling.", "stopping.", "output."),
    "grpc": ("veneer adapter", "/v1/", "--"),
}
"""Words that a caller through this door does not know."""


async def through_cli(front: Front, *arguments: str) -> str:
    run = CliRunner().invoke
    place = {"VENEER_SERVER": front.addresses["grpc"]}
    done = await asyncio.to_thread(run, cli, [*arguments], env=place)
    assert done.exit_code == 1, done.output
    (line,) = (one for one in done.stderr.splitlines() if one.startswith("error: "))
    return str(line)


async def through_http(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await post(http, TEXT, **fields)
    assert answer.status_code >= 400
    return error_of(answer)


async def through_grpc(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return str(caught.value.details())


def only(door: str, message: str, *expected: str) -> None:
    for word in expected:
        assert word in message
    for word in OTHERS[door]:
        assert word not in message, message


@pytest.mark.push
async def test_an_adapter_that_is_not_there(front: Front, http: httpx.AsyncClient) -> None:
    shown = await through_cli(front, "generate", "-a", "nothing", "Hi")
    only("cli", shown, "`veneer adapter ls`")
    told = await through_http(http, model="nothing")
    only("http", told["message"], "GET /v1/models")
    assert told["param"] == "model"
    call = front.inference.Generate(prompt(adapter="nothing"))
    only("grpc", await through_grpc(call), "`ListAdapters`")


@pytest.mark.parametrize(
    ("option", "value", "body", "group"),
    [
        ("--top-p", "3", {"top_p": 3}, {"sampling": {"top_p": 3}}),
        ("--min-p", "3", {"min_p": 3}, {"sampling": {"min_p": 3}}),
        ("--temperature", "300", {"temperature": 300}, {"sampling": {"temperature": 300}}),
        (
            "--max-tokens",
            "99999999",
            {"max_tokens": 99999999},
            {"stopping": {"max_tokens": 99999999}},
        ),
        ("--stop", "x" * 300, {"stop": ["x" * 300]}, {"stopping": {"stop": ["x" * 300]}}),
        ("--n", "99", {"n": 99}, {"output": {"n": 99}}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("--") else "",
)
async def test_a_value_out_of_range(
    front: Front,
    http: httpx.AsyncClient,
    option: str,
    value: str,
    body: dict[str, Any],
    group: dict[str, dict[str, Any]],
) -> None:
    shown = await through_cli(front, "generate", "--raw", "Hi", option, value)
    only("cli", shown, f"error: {option}")
    told = await through_http(http, **body)
    (name,) = body
    only("http", told["message"])
    assert told["message"].startswith(name)
    assert told["param"].partition("[")[0] == name
    kinds = {
        "sampling": inference_pb2.SamplingOptions,
        "stopping": inference_pb2.StoppingOptions,
        "output": inference_pb2.OutputOptions,
    }
    fields = {part: kinds[part](**given) for part, given in group.items()}
    only(
        "grpc",
        await through_grpc(front.inference.Generate(prompt(**fields))),
        f"{next(iter(group))}.{name}",
    )


async def test_other_content_under_a_name(front: Front, tmp_path: Path) -> None:
    await front.push(make_adapter(tmp_path / "one"), "sql")
    other = make_adapter(tmp_path / "two", seed=1)
    shown = await through_cli(front, "adapter", "push", str(other), "--name", "sql")
    only("cli", shown, "replace it with --replace")
    only("grpc", await through_grpc(front.push(other, "sql")), "`allow_replace`")


async def test_an_etag_and_an_alias(front: Front, tmp_path: Path) -> None:
    pushed = await front.push(make_adapter(tmp_path / "one"), "sql")
    shown = await through_cli(front, "adapter", "rm", "sql", "--etag", "x")
    only("cli", shown, "`veneer adapter show`")
    request = adapters_pb2.DeleteAdapterRequest(name="sql", etag="x")
    only("grpc", await through_grpc(front.adapters.DeleteAdapter(request)), "`GetAdapter`")
    await front.adapters.SetAlias(
        adapters_pb2.SetAliasRequest(
            alias="sql/prod",
            targets=[adapters_pb2.AliasTarget(revision=pushed.adapter.revision, weight=1)],
        )
    )
    request = adapters_pb2.DeleteAdapterRequest(name="sql/prod")
    only("grpc", await through_grpc(front.adapters.DeleteAdapter(request)), "`SetAlias`")


async def test_who_calls_by_grpc_s_names_is_answered_in_them(front: Front) -> None:
    shown = await through_cli(front, "call", "GetAdapter", '{"name": "nothing"}')
    only("grpc", shown, "`ListAdapters`")
