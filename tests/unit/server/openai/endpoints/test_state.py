"""Paths that exist and those that do not; health, load, metrics, models with aliases, CORS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_proto.v1 import adapters_pb2
from veneer_server.access.edit_keys import add_key
from veneer_server.access.methods import METHODS
from veneer_server.config import ConfigInvalid, load_config

from tests.refused import refused
from tests.unit.server.openai.kit import BASE, TEXT, error_of, post
from tests.unit.server.rpc.front_harness import Front, make_adapter, running, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

VERBS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
PAGE = "https://chat.example.org"


@asynccontextmanager
async def gateway(base: Path, cache: Path, data: Path, **flags: str) -> AsyncIterator[Any]:
    """A front with its gateway on, and a client of it."""
    async with running(base, cache, data, openai_listen="127.0.0.1:0", **flags) as front:
        url = f"http://{front.addresses['openai']}"
        async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30) as http:
            yield front, http


# ------------------------------------------------------------------------------ paths


@pytest.mark.push
@pytest.mark.parametrize(
    "path",
    [
        "/v1",
        "/v1/",
        "/v2/models",
        "/v1/model",
        "/v1/models/",
        "/openai/",
        "/v1/chat/completions/",
        "/v1/responses/",
        "/v1/conversations/",
        "/metrics/",
        "/HEALTH",
        "/tokenise",
    ],
)
async def test_an_unknown_path_is_never_a_missing_model(
    http: httpx.AsyncClient, path: str
) -> None:
    """LiteLLM puts a model that is not found into cooldown."""
    for verb in VERBS:
        answer = await http.request(verb, path)
        assert answer.status_code == 404, (verb, path)
        if verb != "HEAD":
            error = error_of(answer)
            assert (error["code"], error["param"]) == ("unknown_url", None)
        assert answer.headers["x-should-retry"] == "false"


async def test_head_is_answered_like_get_without_a_body(http: httpx.AsyncClient) -> None:
    got = sorted(name.split()[1] for name in METHODS if name.startswith("GET /"))
    got = [path for path in got if "{" not in path]  # those have an id that must exist
    assert {"/health", "/v1/models", "/metrics", "/ping"} <= set(got)
    for path in (*got, f"/v1/models/{BASE}"):
        get, head = await http.get(path), await http.head(path)
        assert (get.status_code, head.status_code) == (200, 200), path
        assert head.content == b""
        assert head.headers["content-type"] == get.headers["content-type"]
        other = await http.request("DELETE", path)
        assert other.status_code == 405
        if not path.startswith("/api/"):
            assert error_of(other)["code"] == "method_not_allowed"
        assert "GET" in other.headers["allow"]


async def test_ping_is_health(front: Front, http: httpx.AsyncClient) -> None:
    for verb, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
        assert (await http.request(verb, path)).status_code == 200
    front.engine.set_health(False)
    try:
        for verb, path in (("GET", "/health"), ("GET", "/ping"), ("POST", "/ping")):
            answer = await http.request(verb, path)
            assert (answer.status_code, answer.json()["status"]) == (503, "engine_failed")
        alive = await http.get("/livez")
        assert alive.status_code == 200, "a restart of the server would not help its engine"
    finally:
        front.engine.set_health(True)


async def test_load_counts_sequences(front: Front, http: httpx.AsyncClient) -> None:
    assert (await http.get("/load")).json() == {"server_load": 0}
    front.engine.pace = asyncio.Semaphore(0)
    asked = asyncio.create_task(post(http, TEXT, n=3))
    await until(lambda: front.engine.in_flight == 1)
    # Its further samples count once they can run.
    assert (await http.get("/load")).json() == {"server_load": 1}
    others = [asyncio.create_task(post(http, TEXT)) for _ in range(2)]
    await until(lambda: front.engine.in_flight == 3)
    assert (await http.get("/load")).json() == {"server_load": 3}
    for _ in range(100):
        front.engine.pace.release()
    assert [(await each).status_code for each in (asked, *others)] == [200] * 3
    assert (await http.get("/load")).json() == {"server_load": 0}


# ---------------------------------------------------------------------------- metrics


async def test_metrics_are_those_of_their_own_port(
    front: Front, http: httpx.AsyncClient
) -> None:
    def names(page: str) -> set[str]:
        return {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE")}

    here = await http.get("/metrics")
    assert here.headers["content-type"].startswith("text/plain")
    assert names(here.text) == names(await front.metrics()) >= {"veneer_http_requests_total"}
    one = await http.get("/metrics", params={"name[]": "veneer_ready"})
    assert names(one.text) == {"veneer_ready"}
    kind = "application/openmetrics-text;version=1.0.0"
    other = await http.get("/metrics", headers={"accept": kind})
    assert other.headers["content-type"].startswith("application/openmetrics-text")
    assert other.text.endswith("# EOF\n")


async def test_metrics_without_their_own_port(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with gateway(base_folder, front_cache, tmp_path, metrics_listen="") as (front, http):
        await front.push(make_adapter(tmp_path / "a"), "style", activate=True)
        page = (await http.get("/metrics")).text
        assert "veneer_ready 1.0" in page
        assert "style" in page, "the registries are asked"


async def test_metrics_take_the_role_once_there_are_keys(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    keys = {
        role: add_key(file, name=role, tenant="default", roles=[role], expires=None).key
        for role in ("metrics", "inference", "operator")
    }
    # gRPC health needs no key, so the harness can connect.
    async with gateway(base_folder, front_cache, tmp_path / "data", keys_file=str(file)) as (
        _,
        http,
    ):
        told = {
            role: (await http.get("/metrics", headers={"x-api-key": key})).status_code
            for role, key in keys.items()
        }
        told["nobody"] = (await http.get("/metrics")).status_code
        assert told == {"metrics": 200, "operator": 200, "inference": 403, "nobody": 401}


# ----------------------------------------------------------------------------- models


async def test_aliases_are_models(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    first = (await front.push(make_adapter(tmp_path / "a"), "style")).adapter
    second = (
        await front.push(make_adapter(tmp_path / "b", seed=1), "style", allow_replace=True)
    ).adapter
    for alias, revision in (("prod", first.revision), ("next", second.revision)):
        request = adapters_pb2.SetAliasRequest(alias=f"style/{alias}", revision=revision)
        await front.adapters.SetAlias(request)
    listed = (await http.get("/v1/models")).json()["data"]
    assert [model["id"] for model in listed] == [BASE, "style", "style/next", "style/prod"]
    for model in listed:
        assert (await http.get(f"/v1/models/{model['id']}")).json() == model
    _, style, following, prod = listed
    assert following["revision"] == style["revision"] == second.revision
    assert (prod["revision"], prod["root"]) == (
        first.revision,
        f"style@{first.revision[:12]}",
    )
    answer = await post(http, TEXT, model="style/prod")
    assert answer.headers["veneer-revision"] == first.revision
    for missing in ("style/nope", "other/prod"):
        gone = await http.get(f"/v1/models/{missing}")
        assert (gone.status_code, error_of(gone)["code"]) == (404, "model_not_found")


async def test_an_alias_of_several_targets_is_a_model(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    revisions = [
        (
            await front.push(
                make_adapter(tmp_path / f"{at}", seed=at), "mix", allow_replace=True
            )
        ).adapter.revision
        for at in range(2)
    ]
    targets = [
        adapters_pb2.AliasTarget(revision=revision, weight=weight)
        for revision, weight in zip(revisions, (90, 10), strict=True)
    ]
    request = adapters_pb2.SetAliasRequest(alias="mix/canary", targets=targets)
    await front.adapters.SetAlias(request)
    model = (await http.get("/v1/models/mix/canary")).json()
    assert model in (await http.get("/v1/models")).json()["data"]
    assert model["revision"] == revisions[0]
    assert {(each["root"], each["weight"]) for each in model["targets"]} == {
        (f"mix@{revisions[0][:12]}", 90),
        (f"mix@{revisions[1][:12]}", 10),
    }


async def test_anthropics_clients_get_its_form(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    header = {"anthropic-version": "2023-06-01"}
    alone = (await http.get("/v1/models", headers=header)).json()
    assert (alone["first_id"], alone["last_id"]) == (BASE, BASE)
    await front.push(make_adapter(tmp_path / "a"), "style")
    listed = (await http.get("/v1/models", headers=header, params={"limit": 1000})).json()
    assert listed.keys() == {"data", "has_more", "first_id", "last_id"}
    assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, BASE, "style")
    assert [model["id"] for model in listed["data"]] == [BASE, "style"]
    for model in listed["data"]:
        assert model["type"] == "model"
        assert datetime.fromisoformat(model["created_at"]).year > 2000
        assert model["max_input_tokens"] > 0
        named = await http.get(f"/v1/models/{model['id']}", headers=header)
        assert named.json() == model
    for name in ("after_id", "before_id"):
        told = await http.get("/v1/models", headers=header, params={name: "style"})
        assert (told.status_code, error_of(told)["param"]) == (400, name)


# ------------------------------------------------------------------------------- CORS


def asking(origin: str, verb: str = "POST") -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": verb,
        "access-control-request-headers": "authorization,content-type,x-stainless-os",
    }


async def test_without_the_flag_no_page_may_call(http: httpx.AsyncClient) -> None:
    asked = await http.options("/v1/completions", headers=asking(PAGE))
    assert (asked.status_code, error_of(asked)["code"]) == (405, "method_not_allowed")
    answer = await http.get("/health", headers={"origin": PAGE})
    assert not any(name.startswith("access-control") for name in answer.headers)


async def test_pages_of_a_listed_origin_may_call(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, name="app", tenant="default", roles=["inference"], expires=None).key
    async with gateway(
        base_folder,
        front_cache,
        tmp_path / "data",
        keys_file=str(file),
        cors_origin=f"http://localhost:3000,{PAGE.upper()}/",
    ) as (_, http):
        asked = await http.options("/v1/completions", headers=asking(PAGE))
        assert (asked.status_code, asked.content) == (204, b""), "a preflight has no key"
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert asked.headers["access-control-allow-methods"] == "POST"
        assert "x-stainless-os" in asked.headers["access-control-allow-headers"]
        assert "access-control-allow-credentials" not in asked.headers
        body = {**TEXT, "stream": True}
        right = {"origin": PAGE, "authorization": f"Bearer {key}"}
        for headers, status in ((right, 200), ({"origin": PAGE}, 401)):
            answer = await http.post("/v1/completions", json=body, headers=headers)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == PAGE, "of errors too"
            assert answer.headers["vary"] == "origin"
            assert "x-request-id" in answer.headers["access-control-expose-headers"]
        evil = await http.options("/v1/completions", headers=asking("https://evil.example"))
        assert (evil.status_code, error_of(evil)["code"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in evil.headers
        for origin in ("null", "https://chat.example.org.evil.example", "http://localhost"):
            answer = await http.get("/health", headers={"origin": origin})
            assert "access-control-allow-origin" not in answer.headers
        unknown = await http.options("/v1/nothing", headers=asking(PAGE))
        assert (unknown.status_code, error_of(unknown)["code"]) == (404, "unknown_url")
        plain = await http.options("/v1/completions")
        assert plain.status_code == 405


async def test_a_star_lets_all_pages_call(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with gateway(base_folder, front_cache, tmp_path, cors_origin="*") as (_, http):
        asked = await http.options("/health", headers=asking("https://any.example", "GET"))
        assert asked.headers["access-control-allow-origin"] == "*"
        assert asked.headers["access-control-allow-methods"] == "GET"
        assert "access-control-allow-origin" not in (await http.get("/health")).headers


@pytest.mark.parametrize("given", ["chat.example.org", "https://a/b", "https://*.a", "null"])
async def test_what_is_no_origin_is_refused_at_start(given: str) -> None:
    with refused(ConfigInvalid):
        load_config({"cors_origin": given}, {})
