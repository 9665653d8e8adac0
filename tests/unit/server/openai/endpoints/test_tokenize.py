"""``/tokenize`` and ``/detokenize``: the tokens that a request would have."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_server.text.tokenizer import TextTokenizer

from tests.unit.server.access.tenants_kit import shared
from tests.unit.server.openai.kit import BASE, CHAT, TEXT, error_of, ok
from tests.unit.server.rpc.fake_engine import CONTEXT, VOCABULARY
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

SHOUT = "{% for m in messages %}{{ m.role }}!{{ m.content | upper }}{% endfor %}"


async def tokens(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    answer = await http.post("/tokenize", json=fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == CONTEXT
    return found


async def test_a_text_has_the_tokens_of_a_completion(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    found = await tokens(http, model=BASE, prompt="Hello there")
    await ok(http, TEXT, prompt="Hello there")
    assert found["tokens"] == front.engine.submitted[-1].prompt
    assert found["token_strs"] is None
    for special in (True, False):
        found = await tokens(
            http, prompt="Ü 😀", add_special_tokens=special, return_token_strs=True
        )
        ids = tokenizer.encode("Ü 😀", add_special_tokens=special)
        assert found["tokens"] == ids
        assert found["token_strs"] == [tokenizer.token_name(token) for token in ids]
    assert (await tokens(http, prompt=""))["tokens"] == []


async def test_a_chat_has_the_tokens_of_a_chat(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path / "a", template=SHOUT), "shout")
    messages = [{"role": "developer", "content": "Be brief"}, *CHAT["messages"]]
    for model in (BASE, "shout"):
        found = await tokens(http, model=model, messages=messages)
        await ok(http, CHAT, model=model, messages=messages)
        assert found["tokens"] == front.engine.submitted[-1].prompt
        text = (await http.post("/detokenize", json={"tokens": found["tokens"]})).json()
        assert ("BE BRIEF" in text["prompt"]) == (model == "shout")
        assert ("<|im_start|>system" in text["prompt"]) == (model == BASE)


async def test_any_text_comes_back(http: httpx.AsyncClient) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    made = random.Random(seed)
    for _ in range(20):
        text = "".join(made.choice("aé😀 \n<|im_end|>漢\u200d0") for _ in range(8))
        found = await tokens(http, prompt=text, add_special_tokens=False)
        back = await http.post("/detokenize", json={"tokens": found["tokens"], "model": BASE})
        assert back.json() == {"prompt": text}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": CHAT["messages"]}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": CHAT["messages"], "add_special_tokens": True}, None),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "promt"),
        ("/tokenize", {"prompt": "a", "tools": [{"type": "function"}]}, "tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, VOCABULARY]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
async def test_a_bad_field_is_named(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str | None
) -> None:
    answer = await http.post(path, json=fields)
    assert answer.status_code == 400, answer.text
    assert error_of(answer)["param"] == (param or "add_special_tokens")


async def test_no_more_tokens_than_a_sequence_has(http: httpx.AsyncClient) -> None:
    fits = await http.post("/detokenize", json={"tokens": [1000] * CONTEXT})
    assert fits.status_code == 200
    for path, fields in (
        ("/tokenize", {"prompt": "long " * CONTEXT}),
        ("/tokenize", {"prompt": "x" * 3_000_000}),
        ("/tokenize", {"messages": [{"role": "user", "content": "long " * CONTEXT}]}),
        ("/detokenize", {"tokens": [1000] * (CONTEXT + 1)}),
    ):
        answer = await http.post(path, json=fields)
        assert answer.status_code == 400
        assert error_of(answer)["code"] == "context_length_exceeded"


async def test_empty_tokens_are_an_empty_text(http: httpx.AsyncClient) -> None:
    assert (await http.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}


@pytest.mark.push
async def test_another_tenants_adapter_is_not_found(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with shared(base_folder, front_cache, tmp_path / "two") as server:
        ann, bob = server.caller("a"), server.caller("b", "inference")
        await ann.push(make_adapter(tmp_path / "a"), "secret")
        for path, body in (
            ("/tokenize", {"prompt": "Hi"}),
            ("/tokenize", {"messages": CHAT["messages"]}),
            ("/detokenize", {"tokens": [1000]}),
        ):
            assert (await ann.http("POST", path, model="secret", **body)).status_code == 200
            answers = [
                await bob.http("POST", path, model=model, **body)
                for model in ("secret", "nosuch")
            ]
            assert [answer.status_code for answer in answers] == [404, 404]
            assert [error_of(answer)["code"] for answer in answers] == ["model_not_found"] * 2
