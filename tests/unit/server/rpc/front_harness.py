"""A whole front process on real sockets, with a fake engine behind it."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import grpc
import httpx
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2_grpc,
)
from veneer_registry.format import read_upload
from veneer_server.app import App
from veneer_server.config import load_config
from veneer_server.serving.tenants import Tenant, Tenants

from tests.adapter_files import write_adapter
from tests.ports import free_port
from tests.unit.server.rpc.fake_engine import FakeEngine

HIDDEN = 576


@dataclass
class Failure:
    """A failed call, taken apart."""

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    details: dict[str, Any]
    trailing: dict[str, Any]


@dataclass
class Front:
    """A running app and a client's stubs."""

    app: App
    engine: FakeEngine
    channel: grpc.aio.Channel
    addresses: dict[str, str]
    data_dir: Path
    ready: asyncio.Event
    task: asyncio.Task[None]
    told: list[str] = field(default_factory=list)
    """Ready lines."""
    inference: Any = field(init=False)
    adapters: Any = field(init=False)
    server: Any = field(init=False)

    def __post_init__(self) -> None:
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)
        self.adapters = adapters_pb2_grpc.AdapterServiceStub(self.channel)
        self.server = server_pb2_grpc.ServerServiceStub(self.channel)

    @property
    def calls(self) -> int:
        """Number of running calls."""
        return self.app._calls.count  # private: what a drain waits for, and no metric tells

    @property
    def home(self) -> Tenant:
        """The default tenant, for what no call tells, such as leases."""
        tenants: Tenants = self.engine.hold.__self__
        return tenants.default

    async def metrics(self) -> str:
        """The metrics page."""
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(f"http://{self.addresses['metrics']}/metrics")).text

    async def push(self, folder: Path, name: str, **options: Any) -> Any:
        return await self.adapters.UploadAdapter(upload(folder, name, **options))


def upload(
    folder: Path, name: str, *, chunk: int = 1 << 20, **options: Any
) -> Iterable[adapters_pb2.UploadAdapterRequest]:
    """The messages of an upload, as a client sends them."""
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    spec = adapters_pb2.UploadSpec(name=name, **options)
    for file, data in files.items():
        spec.files.add(name=file, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    yield adapters_pb2.UploadAdapterRequest(spec=spec)
    for file, data in files.items():
        for at in range(0, len(data), chunk):
            yield adapters_pb2.UploadAdapterRequest(
                chunk=adapters_pb2.UploadChunk(file=file, offset=at, data=data[at : at + chunk])
            )


def make_adapter(
    folder: Path, *, seed: int = 0, rank: int = 2, template: str | None = None
) -> Path:
    """A small valid adapter for the bundled base; different seeds, different weights."""
    random = np.random.default_rng(seed)
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    write_adapter(
        folder,
        {"r": rank, "lora_alpha": 4, "target_modules": ["q_proj"]},
        {
            f"{stem}.lora_A.weight": random.normal(size=(rank, HIDDEN)).astype(np.float32),
            f"{stem}.lora_B.weight": random.normal(size=(HIDDEN, rank)).astype(np.float32),
        },
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def prompt(text: str = "Hello there", **fields: Any) -> inference_pb2.GenerateRequest:
    """A greedy request for four tokens, unless the fields say otherwise."""
    fields.setdefault("stopping", inference_pb2.StoppingOptions(max_tokens=4))
    return inference_pb2.GenerateRequest(prompt=text, **fields)


async def until(holds: Callable[[], bool]) -> None:
    """Let the loop run until a condition holds; pytest's timeout is the limit."""
    while not holds():  # noqa: ASYNC110 - it waits for states that have no event
        await asyncio.sleep(0.005)


async def _finish(call: Any) -> None:
    if hasattr(call, "__aiter__"):
        async for _ in call:
            pass
    else:
        await call


async def failure(call: Any) -> Failure:
    """Wait for a call (unary, or all of a stream) that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _finish(call)
    error = caught.value
    trailing = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    details: dict[str, Any] = {}
    for packed in status.details:
        kind = packed.TypeName().removeprefix("google.rpc.")
        detail = getattr(error_details_pb2, kind)()
        packed.Unpack(detail)
        details[kind] = detail
    info = details["ErrorInfo"]
    assert info.domain == "veneer"
    assert status.message == error.details()
    return Failure(
        error.code(), error.details(), info.reason, dict(info.metadata), details, trailing
    )


def _port_file(data: Path) -> Path:
    data.mkdir(exist_ok=True)
    port_file = data / "ports.json"
    port_file.unlink(missing_ok=True)
    return port_file


@asynccontextmanager
async def running(
    base: Path,
    cache: Path,
    data: Path,
    *,
    loading: bool = False,
    credentials: grpc.ChannelCredentials | None = None,
    engine: type[FakeEngine] = FakeEngine,
    **flags: str,
) -> AsyncIterator[Front]:
    """Start an app; stop it at the end and check that it ended cleanly.

    Args:
        loading: keep its engine loading until `load_gate` is opened.
        credentials: of the client's channel; None for plain text.
        engine: what is made in the engine's place.
    """
    port_file = _port_file(data)
    config = load_config(
        {
            "base": str(base),
            "listen": f"127.0.0.1:{free_port() if loading else 0}",
            "metrics_listen": "127.0.0.1:0",
            "data_dir": str(data / "data"),
            "cache_dir": str(cache),
            "port_file": str(port_file),
            "grace": "5",
            # Tests send many invalid requests from one host; those about the delay set a rate.
            "refusal_rate": "0",
            **flags,
        },
        {},
    )
    engines: list[FakeEngine] = []

    def make_engine(*args: Any, **kwargs: Any) -> Any:
        engines.append(engine(*args, **kwargs))
        if loading:
            engines[0].load_gate.clear()
            made.set()
        return engines[0]

    ready, made = asyncio.Event(), asyncio.Event()
    told: list[str] = []

    def announce(line: str) -> None:
        told.append(line)
        ready.set()

    app = App(config, announce, make_engine, read_upload)
    task = asyncio.create_task(app.run())
    waiting = asyncio.create_task((made if loading else ready).wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    if not engines:  # a registry makes none
        engines.append(cast(Any, SimpleNamespace(pace=None, in_flight=0)))
    addresses = {"grpc": str(config.listen)}
    if not loading:
        addresses = json.loads(port_file.read_text())
    if credentials is None:
        connecting = grpc.aio.insecure_channel(addresses["grpc"])
    else:
        connecting = grpc.aio.secure_channel(addresses["grpc"], credentials)
    async with connecting as channel:
        await channel.channel_ready()
        try:
            yield Front(app, engines[0], channel, addresses, config.data_dir, ready, task, told)
        finally:  # a server that is still running would crash the interpreter at exit
            app.stop()
            if engines[0].pace is not None:
                for _ in range(10_000):
                    engines[0].pace.release()
            await task
    assert engines[0].in_flight == 0
