"""The configurations of docs/behind-a-proxy.md, in the real nginx, HAProxy and Envoy.

`make tools` brings them. The engine is fake, so that a test says when there is a next token.
"""

from __future__ import annotations

import asyncio
import csv
import json
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2, adapters_pb2_grpc

from tests.docs.pages import read_page
from tests.pki import Pki
from tests.places import REPOSITORY
from tests.ports import free_port
from tests.unit.server.openai.kit import TEXT as ASKED
from tests.unit.server.rpc.front_harness import Front, make_adapter, running, until, upload

NAME = "chat.example.org"
TEXT: dict[str, Any] = {**ASKED}
TOOLS = REPOSITORY / ".cache" / "tools"
PROGRAMS = {
    "nginx": TOOLS / "proxies/usr/sbin/nginx",
    "haproxy": TOOLS / "proxies/usr/sbin/haproxy",
    "envoy": TOOLS / "envoy/envoy/_bin/envoy",
}
LIBRARIES = TOOLS / "proxies/usr/lib"
LANGUAGES = {"nginx": "nginx", "haproxy": "haproxy", "envoy": "yaml"}
LISTEN = {
    "nginx": "listen 443",
    "haproxy": "bind :443",
    "envoy": "address: 0.0.0.0, port_value: 443",
}
LISTEN_AT = {
    "nginx": "listen 127.0.0.1:{}",
    "haproxy": "bind 127.0.0.1:{}",
    "envoy": "address: 127.0.0.1, port_value: {}",
}
ENDPOINT = {
    "nginx": "127.0.0.1:{}",
    "haproxy": "127.0.0.1:{}",
    "envoy": "address: 127.0.0.1, port_value: {}",
}
AROUND_NGINX = """\
user root;  # the folders of the test are its own
daemon off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
access_log off;
client_body_temp_path {folder}/body;
proxy_temp_path {folder}/proxy;
fastcgi_temp_path {folder}/fastcgi;
uwsgi_temp_path {folder}/uwsgi;
scgi_temp_path {folder}/scgi;
{given}
}}
"""
# Where a proxy says what its health checks found. A retry of HAProxy's waits for a second.
ASKED_HAPROXY = """\
global
    stats socket {folder}/asked
defaults
    retries 0
"""
ASKED_ENVOY = """\
admin:
  address: {{pipe: {{path: {folder}/asked}}}}
static_resources:
"""


def configuration(proxy: str, folder: Path, pki: Pki, ports: dict[str, str]) -> str:
    """The page's, with ports and files of the test."""
    page = read_page((REPOSITORY / "docs" / "behind-a-proxy.md").read_text("utf-8"))
    (text,) = [b.text for b in page.blocks if b.language == LANGUAGES[proxy]]
    both = folder / "both.pem"
    both.write_bytes(Path(pki.cert).read_bytes() + Path(pki.key).read_bytes())
    changes = {LISTEN[proxy]: LISTEN_AT[proxy].format(ports["proxy"])}
    for name, port in (("openai", 8000), ("grpc", 50051)):
        changes[ENDPOINT[proxy].format(port)] = ENDPOINT[proxy].format(ports[name])
    if proxy == "haproxy":
        changes |= {
            "/etc/ssl/chat.pem": str(both),
            "check port 8000": f"check port {ports['openai']}",
        }
    else:
        changes |= {"/etc/ssl/chat.pem": pki.cert, "/etc/ssl/chat.key": pki.key}
    if proxy == "haproxy":
        changes |= {"defaults\n": ASKED_HAPROXY.format(folder=folder)}
    elif proxy == "envoy":
        changes |= {"static_resources:\n": ASKED_ENVOY.format(folder=folder)}
    for old, new in changes.items():
        assert old in text, f"the page's configuration for {proxy} has no {old!r}"
        text = text.replace(old, new)
    return AROUND_NGINX.format(folder=folder, given=text) if proxy == "nginx" else text


class Proxy:
    """A running proxy, and clients that trust its certificate."""

    def __init__(self, port: int, pki: Pki, asked: Path) -> None:
        self._port = port
        self._pki = pki
        self._asked = asked

    @asynccontextmanager
    async def http(self, **more: Any) -> AsyncIterator[httpx.AsyncClient]:
        trusting = ssl.create_default_context(cafile=self._pki.ca_file)
        async with httpx.AsyncClient(
            base_url=f"https://{NAME}:{self._port}",
            # No name server knows the name.
            transport=_AtLoopback(verify=trusting),
            timeout=30,
            **more,
        ) as client:
            yield client

    @asynccontextmanager
    async def adapters(self) -> AsyncIterator[Any]:
        trusting = grpc.ssl_channel_credentials(self._pki.ca.cert_pem.bytes())
        options = [("grpc.ssl_target_name_override", NAME)]
        async with grpc.aio.secure_channel(
            f"127.0.0.1:{self._port}", trusting, options
        ) as channel:
            yield adapters_pb2_grpc.AdapterServiceStub(channel)

    async def checks_of_haproxy(self) -> dict[str, str]:
        """The last result of each backend's health check; ``INI`` before the first."""
        reader, writer = await asyncio.open_unix_connection(self._asked)
        writer.write(b"show stat\n")
        rows = csv.DictReader((await reader.read()).decode().lstrip("# ").splitlines())
        writer.close()
        return {row["pxname"]: row["check_status"] for row in rows if row["svname"] == "one"}

    async def checks_of_envoy(self) -> dict[str, str]:
        """The last result of each cluster's health check; ``INI`` before the first."""
        transport = httpx.AsyncHTTPTransport(uds=str(self._asked))
        async with httpx.AsyncClient(transport=transport, base_url="http://envoy") as http:
            stats = (await http.get("/stats?filter=health_check.(success|failure)$")).text
        found: dict[str, dict[str, int]] = {}
        for line in stats.splitlines():
            _, cluster, _, name = line.split(":")[0].split(".")
            found.setdefault(cluster, {})[name] = int(line.split(": ")[1])
        return {
            cluster: "L7OK" if counts["success"] else "FAILED" if counts["failure"] else "INI"
            for cluster, counts in found.items()
        }


class _AtLoopback(httpx.AsyncHTTPTransport):
    """Connects to 127.0.0.1, whatever the URL's name is."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        request.extensions = {**request.extensions, "sni_hostname": request.url.host}
        request.url = request.url.copy_with(host="127.0.0.1")
        return await super().handle_async_request(request)


@asynccontextmanager
async def behind(proxy: str, front: Front, folder: Path) -> AsyncIterator[Proxy]:
    """Run a proxy in front of a server until it passes requests on."""
    program = PROGRAMS[proxy]
    if not program.exists():
        missing = pytest.fail if os.environ.get("CI") else pytest.skip
        missing(f"{proxy} is missing: run `make tools`")
    pki = Pki(folder / "pki")
    pki.renew(NAME)
    port = free_port()
    ports = {name: at.rpartition(":")[2] for name, at in front.addresses.items()}
    file = folder / f"{proxy}.yaml"
    file.write_text(configuration(proxy, folder, pki, {**ports, "proxy": str(port)}))
    flags = {
        "nginx": ("-e", "stderr", "-c", str(file)),
        "haproxy": ("-db", "-f", str(file)),
        "envoy": (
            "--use-dynamic-base-id",
            "--concurrency",
            "1",
            "-l",
            "error",
            "-c",
            str(file),
        ),
    }
    log = folder / f"{proxy}.log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            str(program),
            *flags[proxy],
            env={"LD_LIBRARY_PATH": ":".join(map(str, LIBRARIES.glob("*-linux-gnu")))},
            stdout=output,
            stderr=output,
        )
    running_proxy = Proxy(port, pki, folder / "asked")
    try:
        async with running_proxy.http() as http, asyncio.timeout(30):
            while True:
                assert process.returncode is None, log.read_text()
                try:
                    if (await http.get("/health")).status_code == 200:
                        break
                except httpx.TransportError:
                    await asyncio.sleep(0.02)  # until it listens
        yield running_proxy
    finally:
        if process.returncode is None:
            process.terminate()
            await process.wait()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_front(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    data = tmp_path_factory.mktemp("proxied")
    flags: Any = {"openai_listen": "127.0.0.1:0", "allowed_hosts": NAME}
    flags["audit_log"] = str(data / "audit")
    async with running(base_folder, front_cache, data, **flags) as front:
        yield front


@pytest_asyncio.fixture(
    scope="module", loop_scope="module", params=PROGRAMS, ids=list(PROGRAMS)
)
async def proxy(
    request: pytest.FixtureRequest,
    module_front: Front,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Proxy]:
    async with behind(request.param, module_front, tmp_path_factory.mktemp("proxy")) as proxy:
        yield proxy


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_stream_passes_token_by_token(proxy: Proxy, front: Front) -> None:
    """Each token is made only once the one before it has arrived. What a proxy holds back for
    good never comes; what HAProxy holds back for 0.2 s each time takes longer than the limit,
    of which all tokens together otherwise need a hundredth."""
    front.engine.pace = asyncio.Semaphore(1)
    given = {**TEXT, "max_tokens": 50, "stream": True}
    try:
        async with (
            proxy.http() as http,
            asyncio.timeout(8),
            http.stream("POST", "/v1/completions", json=given) as answer,
        ):
            assert answer.status_code == 200
            lines = answer.aiter_lines()
            for _ in range(given["max_tokens"]):
                while not (line := await anext(lines)):
                    pass
                assert json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                front.engine.pace.release()
            assert "data: [DONE]" in [line async for line in lines]
    finally:
        front.engine.pace = None


async def test_an_upload_over_grpc_through_tls(
    proxy: Proxy, front: Front, tmp_path: Path
) -> None:
    """Of more than any body of the HTTP port may have."""
    folder = make_adapter(tmp_path / "a", rank=960)
    assert (folder / "adapter_model.safetensors").stat().st_size > 4 << 20
    async with proxy.adapters() as adapters:
        await adapters.UploadAdapter(upload(folder, "chat"))
        listed = await adapters.ListAdapters(adapters_pb2.ListAdaptersRequest())
    assert [adapter.name for adapter in listed.adapters] == ["chat"]


async def test_a_body_of_more_than_a_megabyte_passes(proxy: Proxy, front: Front) -> None:
    body = json.dumps(TEXT).encode() + b" " * 1_500_000
    kind = {"content-type": "application/json"}
    async with proxy.http() as http:
        answer = await http.post("/v1/completions", content=body, headers=kind)
        longest = await http.post("/v1/completions", content=b" " * (4 << 20), headers=kind)
    assert answer.status_code == 200, answer.text
    assert longest.json()["error"]["type"] == "invalid_request_error", "not the proxy's error"


async def test_the_servers_own_errors_come_through(proxy: Proxy, front: Front) -> None:
    async with proxy.http() as http:
        known = await http.get("/v1/models")
        unknown = await http.post("/v1/completions", json={**TEXT, "model": "gone"})
        stranger = await http.get("/v1/models", headers={"host": "stranger.example.org"})
    assert known.json()["data"][0]["id"] == TEXT["model"]
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert stranger.json()["error"]["code"] == "host_not_allowed"


async def test_no_header_says_who_calls(proxy: Proxy, front: Front, tmp_path: Path) -> None:
    """The audit log has the proxy's address, whatever a caller writes."""
    audit = front.data_dir.parent / "audit"
    await front.push(make_adapter(tmp_path / "a"), "chat")
    said = {"x-forwarded-for": "192.0.2.7", "forwarded": "for=192.0.2.7"}
    mine = tmp_path.name
    async with proxy.http(headers={**said, "x-request-id": mine}) as http:
        gone = {"lora_name": "chat"}
        assert (await http.post("/v1/unload_lora_adapter", json=gone)).status_code == 200
    await until(lambda: mine in audit.read_text())
    (line,) = [line for line in audit.read_text().splitlines() if mine in line]
    assert "192.0.2.7" not in line
    assert "127.0.0.1" in json.loads(line)["from"]


@pytest.mark.push
@pytest.mark.parametrize("name", ["haproxy", "envoy"])
async def test_the_health_checks_find_the_server_healthy(
    module_front: Front, tmp_path: Path, name: str
) -> None:
    """nginx has none."""
    async with behind(name, module_front, tmp_path) as proxy, asyncio.timeout(30):
        ask = proxy.checks_of_haproxy if name == "haproxy" else proxy.checks_of_envoy
        while "INI" in (checks := await ask()).values():  # noqa: ASYNC110 - in a proxy
            await asyncio.sleep(0.05)
    assert checks == {"veneer_http": "L7OK", "veneer_grpc": "L7OK"}


@pytest.mark.push
@pytest.mark.parametrize("name", PROGRAMS)
async def test_a_draining_server_is_unhealthy_and_its_streams_end_well(
    base_folder: Path, front_cache: Path, tmp_path: Path, name: str
) -> None:
    flags: Any = {"openai_listen": "127.0.0.1:0", "allowed_hosts": NAME}
    async with (
        running(base_folder, front_cache, tmp_path, **flags) as front,
        behind(name, front, tmp_path) as proxy,
        proxy.http() as http,
        proxy.http() as other,
    ):
        front.engine.pace = asyncio.Semaphore(1)
        stream = asyncio.create_task(
            other.post("/v1/completions", json={**TEXT, "stream": True})
        )
        await until(lambda: front.engine.in_flight == 1)
        front.app.stop()
        await until(lambda: front.app.phase.value == "draining")
        assert (await http.get("/health")).status_code == 503
        for _ in range(TEXT["max_tokens"]):
            front.engine.pace.release()
        assert (await stream).text.endswith("data: [DONE]\n\n")
