"""Azure's paths, vLLM's tokens in and out, and what is not served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_server.access.edit_keys import add_key
from veneer_server.openai.routes import NOT_SERVED
from veneer_server.text.tokenizer import TextTokenizer

from tests.places import REPOSITORY
from tests.unit.server.openai.kit import BASE, CHAT, TEXT, error_of, ok
from tests.unit.server.openai.test_browsers import EVIL
from tests.unit.server.openai.tool_kit import long_context, outputs
from tests.unit.server.rpc.fake_engine import CONTEXT, VOCABULARY
from tests.unit.server.rpc.front_harness import Front, make_adapter, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

QUERY = {"api-version": "2024-10-21"}

# -------------------------------------------------------------------------- not served


@pytest.mark.parametrize("path", NOT_SERVED)
async def test_what_is_not_served_says_so_in_a_sentence(
    http: httpx.AsyncClient, path: str
) -> None:
    for verb, below in (("POST", ""), ("GET", "/abc"), ("DELETE", "/abc/content?x=1")):
        answer = await http.request(verb, path + below)
        assert answer.status_code == 404
        assert answer.headers["x-should-retry"] == "false"
        error = answer.json()["error"]
        if not path.startswith("/api/"):
            error = error_of(answer)
            assert (error["code"], error["type"]) == ("not_served", "invalid_request_error")
            error = error["message"]
        assert error == NOT_SERVED[path]
        assert "/v1/models" not in error, "no list of paths"


@pytest.mark.parametrize("path", ["/v1/embeddings2", "/v1/embedding", "/x/v1/embeddings"])
async def test_a_similar_path_is_unknown(http: httpx.AsyncClient, path: str) -> None:
    assert error_of(await http.post(path, json={}))["code"] == "unknown_url"


async def test_the_page_names_what_is_not_served() -> None:
    pages = [
        (REPOSITORY / "docs" / name).read_text("utf-8") for name in ("openai.md", "ollama.md")
    ]
    missing = [path for path in NOT_SERVED if not any(f"`{path}`" in page for page in pages)]
    assert not missing


# ------------------------------------------------------------------------------- Azure


async def test_azures_paths_are_the_same_requests(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    pushed = await front.push(make_adapter(tmp_path), "style")
    short = f"style@{pushed.adapter.revision[:12]}"
    for name, adapter in ((BASE, False), ("style", True), (short, True)):
        for path, body in (("chat/completions", CHAT), ("completions", TEXT)):
            url = f"/openai/deployments/{name}/{path}"
            # The deployment counts, whatever the body calls it.
            for given in (
                {**body, "model": "gpt-4o"},
                {k: v for k, v in body.items() if k != "model"},
            ):
                answer = await http.post(url, params=QUERY, json=given)
                assert answer.status_code == 200, answer.text
                assert answer.json()["model"] == name
                assert (front.engine.submitted[-1].adapter is not None) == adapter
    missing = await http.post("/openai/deployments/none/completions", params=QUERY, json=TEXT)
    assert (missing.status_code, error_of(missing)["code"]) == (404, "model_not_found")
    for path in ("/openai/v1/completions", "/openai/completions"):
        assert (await http.post(path, params=QUERY, json=TEXT)).status_code == 200
    for path in ("/openai/v1/models", "/openai/models"):
        assert BASE in (await http.get(path, params=QUERY)).text
    assert (await http.get(f"/openai/models/{BASE}")).json()["id"] == BASE
    answer = await http.post("/openai/responses", json={"model": BASE, "input": "Hi"})
    assert answer.status_code == 200
    for path in ("/openai/deployments/style/embeddings", "/openai/v1/files"):
        answer = await http.post(path, params=QUERY, json={})
        assert error_of(answer)["code"] == "not_served"
    for path in (
        "/openai/deployments/completions",
        "/openai/deployments//completions",
        "/openai/deployments//chat/completions",
        "/openai/deployments/a/models",
        "/openai/health",
        "/openai/v1/metrics",
        "/openai/v1/load_lora_adapter",
        "/openai/unload_lora_adapter",
        "/openai/pause",
    ):
        answer = await http.post(path, params=QUERY, json={})
        assert error_of(answer)["code"] == "unknown_url", path


async def test_azures_paths_obey_the_rules_of_ours(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys.toml"
    made = {
        role: add_key(keys, name=role, tenant="default", roles=[role], expires=None).key
        for role in ("inference", "publisher", "metrics")
    }
    flags = {"openai_listen": "127.0.0.1:0", "keys_file": str(keys)}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        base = f"http://{front.addresses['openai']}"
        url = f"/openai/deployments/{BASE}/chat/completions"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:

            async def told(headers: Any) -> int:
                asked = http.post(url, params=QUERY, json=CHAT, headers=headers)
                return (await asked).status_code

            key = {"api-key": made["inference"]}
            assert await told(key) == 200
            assert await told({"authorization": f"Bearer {made['inference']}", **key}) == 200
            assert await told({}) == 401
            assert await told({"api-key": "vn_x_y"}) == 401
            assert await told({"api-key": made["publisher"]}) == 403
            assert await told({"x-api-key": made["publisher"], **key}) == 400
            assert await told({"authorization": f"Bearer {made['publisher']}", **key}) == 400
            assert await told([("api-key", key["api-key"])] * 2) == 400
            assert await told({**EVIL, **key}) == 200
            assert await told(EVIL) == 403
            scraping = {"api-key": made["metrics"]}
            metrics = (await http.get("/metrics", headers=scraping)).text
    assert 'veneer_http_requests_total{path="/v1/chat/completions",status="200"} 3.0' in metrics
    assert "deployments" not in metrics


# ------------------------------------------------------------------ tokens in, tokens out


async def tokens(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    sampling = {"max_tokens": 4, **fields.pop("sampling_params", {})}
    body = {"token_ids": [1000, 1001], "sampling_params": sampling, **fields}
    answer = await http.post("/inference/v1/generate", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_token_ids_in_and_out(front: Front, http: httpx.AsyncClient) -> None:
    given = {"temperature": 0.5, "top_k": 3, "seed": 7, "n": 2, "min_p": None}
    text = {**TEXT, "prompt": [1000, 1001], "return_token_ids": True}
    expected = await ok(http, text, **given)
    wanted = front.engine.submitted[0]
    found = await tokens(
        http, sampling_params={**given, "detokenize": False}, request_id="mine"
    )
    asked = front.engine.submitted[2]
    assert (asked.prompt, asked.sampling) == ([1000, 1001], wanted.sampling)
    assert found["request_id"] == "mine"
    assert expected["usage"].items() <= found["usage"].items()
    for mine, theirs in zip(found["choices"], expected["choices"], strict=True):
        assert mine == {
            "index": theirs["index"],
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": theirs["token_ids"],
        }


async def test_scores_name_tokens_by_their_ids(http: httpx.AsyncClient) -> None:
    found = await tokens(http, sampling_params={"logprobs": 2, "prompt_logprobs": 1})
    (choice,) = found["choices"]
    named = [score["token"] for score in choice["logprobs"]["content"]]
    assert named == [f"token_id:{token}" for token in choice["token_ids"]]
    assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
    assert len(found["prompt_logprobs"]) == 2


async def test_a_stream_has_the_same_tokens(http: httpx.AsyncClient) -> None:
    whole = await tokens(http, sampling_params={"seed": 3, "logprobs": 0})
    body = {
        "token_ids": [1000, 1001],
        "sampling_params": {"max_tokens": 4, "seed": 3, "logprobs": 0},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    answer = await http.post("/inference/v1/generate", json=body)
    *events, done, last = answer.text.split("\n\n")
    assert (done, last) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert chunks.pop()["usage"] == whole["usage"]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert all(chunk.keys() == {"request_id", "choices", "usage"} for chunk in chunks)
    joined = [token for choice in choices for token in choice["token_ids"]]
    assert joined == whole["choices"][0]["token_ids"]
    scores = [score for choice in choices for score in choice["logprobs"]["content"]]
    assert scores == whole["choices"][0]["logprobs"]["content"]
    assert choices[-1]["finish_reason"] == "length"


async def test_a_salt_shares_no_prefix(front: Front, http: httpx.AsyncClient) -> None:
    await tokens(http, cache_salt="s")
    await tokens(http)
    first, second = front.engine.submitted
    assert (first.use_prefix_cache, second.use_prefix_cache) == (False, True)


async def test_without_a_limit_it_may_use_the_context(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    front.engine.script = list(outputs(tokenizer, "Hello."))
    async with long_context(front):
        await tokens(http, sampling_params={"max_tokens": None}, features={})
    assert front.engine.submitted[-1].max_tokens == 4000 - 2


async def test_what_nobody_knows_is_named(http: httpx.AsyncClient) -> None:
    sampling = {"max_tokens": 1, "thing": 2, "stream_interval": 3}
    body = {"token_ids": [1000], "sampling_params": sampling, "frob": 1}
    answer = await http.post("/inference/v1/generate", json=body)
    assert (answer.status_code, answer.headers["veneer-ignored"]) == (200, "frob, thing")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [[1]]}, "token_ids"),
        ({"token_ids": "Hi"}, "token_ids"),
        ({"token_ids": [VOCABULARY]}, "vocabulary"),
        ({"token_ids": None}, "token_ids"),
        ({"features": {"mm_hashes": {"image": ["a"]}}}, "features"),
        ({"kv_transfer_params": {"do_remote_decode": True}}, "kv_transfer_params"),
        ({"sampling_params": {"max_tokens": CONTEXT}}, "max_tokens"),
        ({"sampling_params": {"echo": True}}, "sampling_params.echo"),
        ({"sampling_params": {"bad_words": ["a"]}}, "bad_words"),
        ({"sampling_params": {"temprature": 1}}, "temperature"),
        ({"sampling_params": {"temperature": 1000}}, "temperature"),
        ({"sampling_params": []}, "sampling_params"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
async def test_a_bad_field_is_named(
    front: Front, http: httpx.AsyncClient, fields: dict[str, Any], says: str
) -> None:
    body = {"token_ids": [1000], "sampling_params": {"max_tokens": 1}, **fields}
    answer = await http.post("/inference/v1/generate", json=body)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert says in error["message"]
    if "token_ids" in fields:
        assert error["param"] == "token_ids"
    assert not front.engine.submitted


# ------------------------------------------------------------------ vLLM's small paths


async def test_what_trainers_ask(
    front: Front, http: httpx.AsyncClient, base_folder: Path
) -> None:
    assert (await http.get("/get_world_size")).json() == {"world_size": 1}
    told = (await http.get("/tokenizer_info")).json()
    config = json.loads((base_folder / "tokenizer_config.json").read_text("utf-8"))
    assert told["tokenizer_class"] == config["tokenizer_class"]
    assert "<|im_start|>" in told["chat_template"]
    answer = await http.post("/reset_prefix_cache", params={"reset_running_requests": "true"})
    assert (answer.status_code, answer.json()) == (200, {"success": True})
    assert front.engine.resets == 1
