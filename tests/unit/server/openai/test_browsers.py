"""Web pages of strangers do nothing to a server that asks for no key."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from veneer_server.access.edit_keys import add_key

from tests.unit.server.openai.kit import TEXT, error_of
from tests.unit.server.rpc.front_harness import Front, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

EVIL = {"origin": "https://evil.example"}
FOREIGN: dict[str, dict[str, str]] = {
    "another origin": EVIL,
    "another port of this machine": {"origin": "http://localhost:3000"},
    "no origin that has a name": {"origin": "null"},
    "rubbish": {"origin": "localhost"},
    "another site": {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
    "another subdomain": {"sec-fetch-site": "same-site"},
    "a form": {
        "sec-fetch-site": "cross-site",
        "sec-fetch-mode": "navigate",
        "sec-fetch-dest": "document",
    },
}
CHANGES = (
    "/pause?mode=keep",
    "/resume",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/reset_prefix_cache",
)
GENERATES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/inference/v1/generate",
    "/api/chat",
    "/api/generate",
    "/openai/deployments/a/chat/completions?api-version=1",
    "/openai/v1/completions",
)
READS = (
    "/v1/models",
    "/metrics",
    "/load",
    "/version",
    "/server_info",
    "/is_paused",
    "/",
    "/api/tags",
    "/api/ps",
    "/api/version",
    "/get_world_size",
    "/tokenizer_info",
)
JSON = {"content-type": "application/json"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def open_front(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    """A front that other machines can reach, and that asks for no key."""
    flags = {"openai_listen": "0.0.0.0:0", "metrics_listen": "0.0.0.0:0", "insecure": "true"}
    data = tmp_path_factory.mktemp("open")
    async with running(base_folder, front_cache, data, **flags) as front:
        yield front


@pytest.mark.parametrize("name", FOREIGN)
async def test_a_page_of_another_origin_is_refused(
    front: Front, http: httpx.AsyncClient, name: str
) -> None:
    asking = ("/tokenize", "/v1/messages/count_tokens", "/api/show")
    for path in (*CHANGES, *GENERATES, *asking):
        for kind in ({}, JSON, {"content-type": "text/plain"}):
            answer = await http.post(path, content=b"{}", headers=FOREIGN[name] | kind)
            assert answer.status_code == 403, (path, answer.text)
            assert "--cors-origin" in answer.text
            if not path.startswith("/api/"):
                assert error_of(answer)["code"] == "origin_not_allowed"
    if name != "a form":
        for path in READS:
            answer = await http.get(path, headers=FOREIGN[name])
            assert answer.status_code == 403, (path, answer.text)
    assert (await http.get("/is_paused")).json() == {"is_paused": False}


async def test_the_metrics_port_refuses_it_too(front: Front) -> None:
    url = f"http://{front.addresses['metrics']}/metrics"
    async with httpx.AsyncClient(trust_env=False) as client:
        for headers in (EVIL, {"sec-fetch-site": "cross-site"}, {"host": "evil.example"}):
            assert (await client.get(url, headers=headers)).status_code == 403
        opened = {
            "sec-fetch-site": "cross-site",
            "sec-fetch-mode": "navigate",
            "sec-fetch-dest": "document",
        }
        for headers in ({}, opened, {"sec-fetch-site": "none"}):
            assert (await client.get(url, headers=headers)).status_code == 200


async def test_programs_and_own_pages_are_served(front: Front, http: httpx.AsyncClient) -> None:
    own = f"http://{front.addresses['openai']}"
    for headers in (
        {},
        {"sec-fetch-site": "none"},
        {"origin": own, "sec-fetch-site": "same-origin"},
        {"origin": own},
    ):
        assert (await http.post("/v1/completions", json=TEXT, headers=headers)).is_success
        assert (await http.get("/v1/models", headers=headers)).is_success
    # TLS that a proxy has ended.
    answer = await http.get(
        "/v1/models", headers={"host": "localhost", "origin": "https://localhost"}
    )
    assert answer.is_success
    # `curl -d` says that it sends a form, and `curl -X POST` nothing at all.
    for headers in ({}, {"content-type": "application/x-www-form-urlencoded"}):
        for path in ("/pause?mode=keep", "/resume"):
            assert (await http.post(path, content=b"", headers=headers)).is_success
        told = json.dumps(TEXT).encode()
        assert (await http.post("/v1/completions", content=told, headers=headers)).is_success


async def test_an_own_page_says_json(front: Front, http: httpx.AsyncClient) -> None:
    """A browser asks before it sends JSON for a page of another origin."""
    own = {"origin": f"http://{front.addresses['openai']}"}
    for kind in ({}, {"content-type": "text/plain"}):
        refused = await http.post("/pause?mode=keep", headers=own | kind)
        assert refused.status_code == 415
    assert (await http.post("/resume", headers=own | JSON)).is_success


@pytest.mark.push
async def test_pages_that_are_allowed_are_served(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    for given, refused in (("https://chat.example", EVIL), ("*", None)):
        data = tmp_path / given.strip("*:/")[:5]
        flags = {"openai_listen": "127.0.0.1:0", "cors_origin": given}
        async with running(base_folder, front_cache, data, **flags) as front:
            base = f"http://{front.addresses['openai']}"
            async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
                page = {"origin": "https://chat.example", "sec-fetch-site": "cross-site"}
                answer = await http.post("/v1/completions", json=TEXT, headers=page)
                assert answer.is_success, answer.text
                if refused:
                    assert (await http.get("/v1/models", headers=refused)).status_code == 403


async def test_a_key_is_all_that_counts_where_there_are_keys(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    made = add_key(keys, name="me", tenant="default", roles=["operator"], expires=None)
    flags = {"openai_listen": "127.0.0.1:0", "keys_file": str(keys)}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        base = f"http://{front.addresses['openai']}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            key = {"authorization": f"Bearer {made.key}"}
            assert (await http.get("/v1/models", headers=EVIL | key)).is_success
            # What a browser adds by itself, such as a certificate, is no key.
            refused = await http.get("/v1/models", headers=EVIL)
            assert refused.status_code == 403
            assert "without a key" in refused.text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("some.name", 403),
        ("evil.example:8000", 403),
        ("notsvc", 200),
        ("10.0.3.7:8000", 200),
        ("[fd00::7]:8000", 200),
        ("veneer", 200),
        ("veneer.llm.svc", 200),
        ("veneer.llm.svc.cluster.local:8000", 200),
        ("localhost", 200),
        ("host.docker.internal", 200),
        ("evil.examplesvc", 403),
        ("gpu1.local", 200),
        ("gpu1.home.arpa", 200),
        ("gpu1.lan", 403),
    ],
)
async def test_names_that_strangers_can_register_are_refused_where_others_can_connect(
    open_front: Front, host: str, status: int
) -> None:
    port = open_front.addresses["openai"].rsplit(":", 1)[1]
    metrics = open_front.addresses["metrics"].rsplit(":", 1)[1]
    async with httpx.AsyncClient(trust_env=False) as http:
        for path in (f"{port}/v1/models", f"{metrics}/metrics"):
            answer = await http.get(f"http://127.0.0.1:{path}", headers={"host": host})
            assert answer.status_code == status, path
