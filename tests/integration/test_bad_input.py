"""Bad input against the real server: a clear error, and nothing is lost."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from veneer_proto.v1 import adapters_pb2, inference_pb2

from tests.server_harness import Server, read_files, request, upload_messages

pytestmark = [
    pytest.mark.push,
    pytest.mark.real_base,
    pytest.mark.asyncio(loop_scope="session"),
]

Files = dict[str, bytes]
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def with_config(files: Files, **changes: Any) -> Files:
    config = json.loads(files[CONFIG]) | changes
    return files | {CONFIG: json.dumps(config).encode()}


def with_header(files: Files, change: Callable[[dict[str, Any]], None]) -> Files:
    """Rewrite the safetensors header, the data left as it is."""
    raw = files[WEIGHTS]
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    body = json.dumps(header).encode()
    return files | {WEIGHTS: struct.pack("<Q", len(body)) + body + raw[8 + size :]}


def with_nan(files: Files) -> Files:
    raw = bytearray(files[WEIGHTS])
    raw[-4:] = np.array([np.nan], dtype="<f4").tobytes()
    return files | {WEIGHTS: bytes(raw)}


def grow_first(header: dict[str, Any]) -> None:
    name = next(key for key in header if key != "__metadata__")
    header[name]["shape"][0] *= 2


def rename_first(header: dict[str, Any]) -> None:
    name = next(key for key in header if key != "__metadata__")
    header["../../etc/passwd"] = header.pop(name)


def transposed(header: dict[str, Any]) -> None:
    for name, tensor in header.items():
        if name != "__metadata__":
            tensor["shape"].reverse()


OTHER_BASE = {"base_fingerprint": {"weights": "1" * 64, "tokenizer": "2" * 64}}

BAD_ADAPTERS: dict[str, tuple[Callable[[Files], Files], str, str]] = {
    # name: (what is done to a good bundle, reason, what the message names)
    "pickle": (lambda f: f | {"adapter_model.bin": b"\x80\x04."}, "ADAPTER_INVALID", "pickle"),
    "truncated": (lambda f: f | {WEIGHTS: f[WEIGHTS][:-7]}, "ADAPTER_INVALID", WEIGHTS),
    "oversized": (lambda f: f | {WEIGHTS: f[WEIGHTS] + b"x"}, "ADAPTER_INVALID", WEIGHTS),
    "header bomb": (
        lambda f: f | {WEIGHTS: struct.pack("<Q", 1 << 60) + f[WEIGHTS][8:]},
        "ADAPTER_INVALID",
        "header",
    ),
    "shape lies": (lambda f: with_header(f, grow_first), "ADAPTER_INVALID", "lora_A"),
    "wrong shapes": (lambda f: with_header(f, transposed), "ADAPTER_INVALID", "lora_"),
    "traversal": (lambda f: with_header(f, rename_first), "ADAPTER_INVALID", "etc/passwd"),
    "NaN": (with_nan, "ADAPTER_INVALID", "NaN"),
    "unknown key": (lambda f: with_config(f, magic=3), "ADAPTER_INVALID", "magic"),
    "DoRA": (lambda f: with_config(f, use_dora=True), "ADAPTER_INVALID", "use_dora"),
    "other base": (
        lambda f: f | {"training_manifest.json": json.dumps(OTHER_BASE).encode()},
        "BASE_MODEL_MISMATCH",
        "1" * 12,
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_ADAPTERS))
async def test_a_bad_adapter_is_refused_by_name_and_leaves_nothing(
    case: str, server: Server, real_adapters: dict[str, Path]
) -> None:
    spoil, reason, names = BAD_ADAPTERS[case]
    files = spoil(read_files(real_adapters["all-linear"]))
    refused = await server.refused(server.push_files(files, "bad"))
    assert refused.reason == reason, refused
    assert names in refused.message
    listed = await server.adapters.ListAdapters(
        adapters_pb2.ListAdaptersRequest(name_prefix="bad")
    )
    assert not listed.adapters


@pytest.mark.parametrize("name", ["../x", "a/b", "", "UPPER", "x" * 64, ".hidden"])
async def test_names_are_never_paths(
    name: str, server: Server, real_adapters: dict[str, Path]
) -> None:
    refused = await server.refused(server.push(real_adapters["rank-1"], name))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")


async def test_file_names_are_never_paths(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    files = read_files(real_adapters["rank-1"]) | {"../../evil.json": b"{}"}
    refused = await server.refused(server.push_files(files, "bad"))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "ADAPTER_INVALID")
    assert "evil" in refused.message


async def test_changed_bytes_are_noticed(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    def flip(message: Any) -> None:
        if message.chunk.file == WEIGHTS:
            message.chunk.data = bytes([message.chunk.data[0] ^ 1]) + message.chunk.data[1:]

    messages = upload_messages(read_files(real_adapters["rank-1"]), "bad", tamper=flip)
    refused = await server.refused(server.adapters.UploadAdapter(messages))
    assert (refused.code, refused.reason) == ("INVALID_ARGUMENT", "CHECKSUM_MISMATCH")
    assert WEIGHTS in refused.message


async def test_a_name_is_not_replaced_unless_that_was_asked_for(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    before = await server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="rank-1"))
    refused = await server.refused(server.push(real_adapters["rank-4"], "rank-1"))
    assert (refused.code, refused.reason) == ("ALREADY_EXISTS", "ADAPTER_EXISTS")
    again = await server.push(real_adapters["rank-1"], "rank-1")
    assert not again.published
    assert again.adapter.revision == before.adapter.revision


async def test_a_client_that_vanishes_midway_leaves_nothing_and_may_try_again(
    server: Server, real_adapters: dict[str, Path]
) -> None:
    messages = upload_messages(read_files(real_adapters["rank-64"]), "half")

    call = server.adapters.UploadAdapter()
    for message in messages[: len(messages) // 2]:
        await call.write(message)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    gone = await server.refused(
        server.adapters.GetAdapter(adapters_pb2.GetAdapterRequest(name="half"))
    )
    assert gone.reason == "ADAPTER_NOT_FOUND"
    assert (await server.push(real_adapters["rank-64"], "half")).published
    await server.adapters.DeleteAdapter(adapters_pb2.DeleteAdapterRequest(name="half"))


async def test_an_unknown_adapter_is_an_error_never_the_base(server: Server) -> None:
    refused = await server.refused(server.generate(prompt="Hi", adapter="rank-61"))
    assert (refused.code, refused.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert refused.metadata["did_you_mean"] in {"rank-1", "rank-16", "rank-64"}


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "empty prompt": ({"prompt": ""}, "INVALID_FIELD", "prompt"),
    "no input": ({}, "INVALID_FIELD", "prompt"),
    "over-long prompt": ({"token_ids": [5] * 9000}, "CONTEXT_TOO_LONG", "9000"),
    "token out of range": ({"token_ids": [10**6]}, "INVALID_FIELD", "token_ids"),
    "NaN temperature": (
        {"prompt": "x", "sampling": {"temperature": float("nan")}},
        "INVALID_FIELD",
        "temperature",
    ),
    "negative temperature": (
        {"prompt": "x", "sampling": {"temperature": -1}},
        "INVALID_FIELD",
        "temperature",
    ),
    "infinite temperature": (
        {"prompt": "x", "sampling": {"temperature": float("inf")}},
        "INVALID_FIELD",
        "temperature",
    ),
    "top_p zero": ({"prompt": "x", "sampling": {"top_p": 0}}, "INVALID_FIELD", "top_p"),
    "top_p above one": ({"prompt": "x", "sampling": {"top_p": 1.1}}, "INVALID_FIELD", "top_p"),
    "no tokens wanted": (
        {"prompt": "x", "stopping": {"max_tokens": 0}},
        "INVALID_FIELD",
        "max_tokens",
    ),
    "more tokens than the context": (
        {"prompt": "x", "stopping": {"max_tokens": 10**6}},
        "CONTEXT_TOO_LONG",
        "max_tokens",
    ),
    "empty stop string": ({"prompt": "x", "stopping": {"stop": [""]}}, "INVALID_FIELD", "stop"),
    "many stop strings": (
        {"prompt": "x", "stopping": {"stop": ["a"] * 17}},
        "INVALID_FIELD",
        "stop",
    ),
    "min_p above one": ({"prompt": "x", "sampling": {"min_p": 1.1}}, "INVALID_FIELD", "min_p"),
    "bias outside the vocabulary": (
        {"prompt": "x", "sampling": {"logit_bias": {49152: 1.0}}},
        "INVALID_FIELD",
        "logit_bias",
    ),
    "seventeen samples": ({"prompt": "x", "output": {"n": 17}}, "INVALID_FIELD", "output.n"),
    "a schema that is none": (
        {"prompt": "x", "constraint": inference_pb2.Constraint(json_schema='{"type": 3}')},
        "INVALID_FIELD",
        "constraint.json_schema",
    ),
    "a regex that looks ahead": (
        {"prompt": "x", "constraint": inference_pb2.Constraint(regex="(?=x)y")},
        "INVALID_FIELD",
        "look-ahead",
    ),
    "later: a mix": (
        {"prompt": "x", "adapters": [inference_pb2.AdapterWeight(adapter="mlp", weight=1)]},
        "UNIMPLEMENTED",
        "adapters",
    ),
}


@pytest.mark.parametrize("case", sorted(BAD_REQUESTS))
async def test_a_bad_request_is_refused_and_names_the_field(case: str, server: Server) -> None:
    fields, reason, names = BAD_REQUESTS[case]
    refused = await server.refused(server.generate(**fields))
    assert refused.reason == reason, refused
    assert names in refused.message
    streamed = await server.refused(server.stream(**fields).rest())
    assert streamed == refused


async def test_a_registration_without_a_uri_names_the_field(server: Server) -> None:
    refused = await server.refused(
        server.adapters.RegisterAdapter(adapters_pb2.RegisterAdapterRequest(name="new"))
    )
    assert refused.reason == "INVALID_FIELD", refused
    assert "uri" in refused.message


async def test_after_all_of_this_the_server_answers_as_before(server: Server) -> None:
    answer = await server.inference.Generate(request(prompt="The capital of France is"))
    assert "Paris" in answer.text
