"""The endpoint picker behind a real Envoy, in front of two real HTTP ports with their real
metrics pages; `make tools` brings Envoy. The engines behind the ports are fake."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.backends_ran import server_environment
from tests.pki import Pki
from tests.places import REPOSITORY
from tests.ports import free_port
from tests.unit.server.picker.test_picker import FakeEngine, Gateway
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

pytestmark = pytest.mark.push

ENVOY = REPOSITORY / ".cache" / "tools" / "envoy/envoy/_bin/envoy"
SERVER = str(Path(sys.executable).with_name("veneer-server"))
ADAPTERS = tuple(f"a{number}" for number in range(6))
TYPE = "type.googleapis.com/envoy.extensions"


def configuration(port: int, picker: int) -> dict[str, Any]:
    """What an implementation of the Gateway API makes of an InferencePool, in short."""
    ext_proc = {
        "@type": f"{TYPE}.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "5s"},
        "message_timeout": "5s",
        "processing_mode": {
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED",
            "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND",
            "response_trailer_mode": "SEND",
        },
        "metadata_options": {"receiving_namespaces": {"untyped": ["envoy.lb"]}},
    }
    manager = {
        "@type": f"{TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "pool",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "pool",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            "route": {"cluster": "pool", "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {"name": "envoy.filters.http.ext_proc", "typed_config": ext_proc},
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{TYPE}.filters.http.router.v3.Router"},
            },
        ],
    }
    listener = {
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [
            {
                "filters": [
                    {
                        "name": "envoy.filters.network.http_connection_manager",
                        "typed_config": manager,
                    }
                ]
            }
        ],
    }
    pool = {
        "name": "pool",
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "original_dst_lb_config": {
            "use_http_header": True,
            "http_header_name": "x-gateway-destination-endpoint",
        },
    }
    options = f"{TYPE}.upstreams.http.v3.HttpProtocolOptions"
    at = {"socket_address": {"address": "127.0.0.1", "port_value": picker}}
    processor = {
        "name": "picker",
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": options,
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "load_assignment": {
            "cluster_name": "picker",
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at}}]}],
        },
    }
    return {"static_resources": {"listeners": [listener], "clusters": [pool, processor]}}


@asynccontextmanager
async def program(log: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=output, stderr=output, env=server_environment()
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0, log


async def serving(
    channel: grpc.aio.Channel, picker: asyncio.subprocess.Process, log: Path
) -> None:
    """Wait until the picker's health says so, as a gateway's readiness does."""
    stub: Any = health_pb2_grpc.HealthStub(channel)
    asked = health_pb2.HealthCheckRequest(service="readiness")
    while True:
        assert picker.returncode is None, log
        answer = await stub.Check(asked, wait_for_ready=True)
        if answer.status == health_pb2.HealthCheckResponse.SERVING:
            return


@dataclass
class Pool:
    """Two servers, and a client of the gateway in front of them."""

    fronts: list[Front]
    http: httpx.AsyncClient

    def counts(self) -> list[int]:
        """Requests that each engine has got."""
        return [len(front.engine.submitted) for front in self.fronts]

    async def ask(self, model: str, **more: Any) -> int:
        """Which server answered a completion."""
        before = self.counts()
        body = {"model": model, "prompt": "Hello", "max_tokens": 2}
        answer = await self.http.post("/v1/completions", json=body, **more)
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["choices"][0]["text"]) > 0
        (at,) = [i for i, (a, b) in enumerate(zip(before, self.counts(), strict=True)) if a < b]
        return at


@asynccontextmanager
async def pool_of_two(base: Path, cache: Path, folder: Path) -> AsyncIterator[Pool]:
    if not ENVOY.exists():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing("envoy is missing: run `make tools`")
    flags: Any = {"openai_listen": "127.0.0.1:0", "metrics_names": "vllm"}
    async with AsyncExitStack() as stack:
        fronts = []
        for name in ("one", "two"):
            front = await stack.enter_async_context(
                running(base, cache, folder / name, **flags)
            )
            for seed, adapter in enumerate(ADAPTERS):
                await front.push(make_adapter(folder / name / adapter, seed=seed), adapter)
            fronts.append(front)
        picker, port = free_port(), free_port()
        log = folder / "picker.log"
        replicas = [f"--replica={front.addresses['openai']}" for front in fronts]
        process = await stack.enter_async_context(
            program(log, SERVER, "picker", f"--listen=127.0.0.1:{picker}", *replicas)
        )
        async with grpc.aio.insecure_channel(f"127.0.0.1:{picker}") as channel:
            await serving(channel, process, log)
        file = folder / "envoy.json"
        file.write_text(json.dumps(configuration(port, picker)))
        quiet = ("--use-dynamic-base-id", "--concurrency", "1", "-l", "error")
        envoy_log = folder / "envoy.log"
        envoy = await stack.enter_async_context(
            program(envoy_log, str(ENVOY), *quiet, "-c", str(file))
        )
        http = await stack.enter_async_context(
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30)
        )
        while True:
            assert envoy.returncode is None, envoy_log.read_text()
            try:
                await http.get("/health")
                break
            except httpx.TransportError:
                await asyncio.sleep(0.02)  # until it listens
        yield Pool(fronts, http)


async def test_envoy_sends_requests_where_the_picker_says(
    base_folder: Path, tmp_path: Path
) -> None:
    async with pool_of_two(base_folder, tmp_path / "cache", tmp_path) as pool:
        # An adapter is at one server, adapters are at both; a caller's own choice is ignored.
        first = {name: await pool.ask(name) for name in ADAPTERS}
        nowhere = {"x-gateway-destination-endpoint": "127.0.0.1:1"}
        assert {name: await pool.ask(name, headers=nowhere) for name in ADAPTERS} == first
        assert set(first.values()) == {0, 1}

        # Token by token, though each piece passes through the picker.
        front = pool.fronts[first["a0"]]
        front.engine.pace = asyncio.Semaphore(1)
        body = {"model": "a0", "prompt": "Hello", "max_tokens": 8, "stream": True}
        async with pool.http.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.aiter_lines()
            for _ in range(8):
                while not (line := await anext(lines)):
                    pass
                assert json.loads(line.removeprefix("data: "))["choices"]
                front.engine.pace.release()
            assert "data: [DONE]" in [line async for line in lines]
        front.engine.pace = None

        # A server drains: all requests go to the other one, and none fails once that is known.
        gone = first["a0"]
        pool.fronts[gone].app.stop()
        await pool.fronts[gone].task
        answered = []
        while len(answered) < 3:
            asked = {"model": "a0", "prompt": "Hello", "max_tokens": 2}
            answer = await pool.http.post("/v1/completions", json=asked)
            # Until the picker has looked again, Envoy cannot connect.
            answered = [*answered, answer.status_code] if answer.status_code == 200 else []
        assert await pool.ask("a0") == 1 - gone


async def test_tls_on_both_sides(tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(pki.cert, pki.key)
    engine, port, log = FakeEngine(), free_port(), tmp_path / "log"
    await engine.start(context)
    files = (f"--tls-cert={pki.cert}", f"--tls-key={pki.key}", f"--replica-ca={pki.ca_file}")
    command = (SERVER, "picker", f"--replica={engine.address}", f"--listen=127.0.0.1:{port}")
    credentials = grpc.ssl_channel_credentials(pki.ca.cert_pem.bytes())
    async with (
        program(log, *command, *files) as process,
        grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials) as channel,
    ):
        await serving(channel, process, log)
        assert await Gateway(channel).ask("chat") == engine.address
    await engine.stop()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--replica", "engines"), "--replica: 'engines' is not allowed"),
        (("--replica", "a:1", "--tls-cert", "c"), "--tls-key belong together: give both"),
        (("--replica", "a:1", "--log-format", "xml"), "neither console nor json"),
    ],
)
async def test_wrong_flags_are_refused(flags: tuple[str, ...], said: str) -> None:
    process = await asyncio.create_subprocess_exec(
        SERVER, "picker", *flags, stderr=asyncio.subprocess.PIPE, env=server_environment()
    )
    _, error = await process.communicate()
    assert process.returncode == 1
    assert said in error.decode()
