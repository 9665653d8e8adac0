"""Answers over real sockets with a fake engine: shapes, streams, models."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_registry.errors import VeneerError
from veneer_registry.records import AdapterRecord
from veneer_registry.registry import Registry
from veneer_server.openai import models
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.openai.kit import BASE, CHAT, TEXT, error_of, events, ok, post
from tests.unit.server.rpc.fake_engine import CONTEXT, fake_tokens
from tests.unit.server.rpc.front_harness import Front, make_adapter, until

pytestmark = pytest.mark.asyncio(loop_scope="module")


# --------------------------------------------------------------------------- shapes


async def test_a_chat_answer(http: httpx.AsyncClient, tokenizer: TextTokenizer) -> None:
    answer = await post(http, CHAT, seed=7)
    body = answer.json()
    request_id = answer.headers["x-request-id"]
    [choice] = body["choices"]
    assert body["id"] == f"chatcmpl-{request_id}"
    assert body["object"] == "chat.completion"
    assert body["model"] == BASE
    assert body["system_fingerprint"].startswith("fp_")
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert choice["message"]["role"] == "assistant"
    assert len(tokenizer.encode(choice["message"]["content"], add_special_tokens=False)) >= 1
    usage = body["usage"]
    assert usage["completion_tokens"] == 4
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16}
    assert "veneer-revision" not in answer.headers


async def test_a_stream_says_the_same_as_a_whole_answer(http: httpx.AsyncClient) -> None:
    for given in (CHAT, TEXT):
        more = {"seed": 7, "max_tokens": 12}
        whole = await ok(http, given, **more)
        chunks = await events(http, given, **more)
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert all(chunk["object"] == whole["object"] + ".chunk" for chunk in chunks) or (
            all(chunk["object"] == whole["object"] == "text_completion" for chunk in chunks)
        )
        assert not any("usage" in chunk for chunk in chunks)
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        ends = [choice["finish_reason"] for choice in choices]
        assert ends[-1] == "length"
        assert not any(ends[:-1])
        if given is CHAT:
            assert choices[0]["delta"] == {"role": "assistant", "content": ""}
            text = "".join(choice["delta"].get("content", "") for choice in choices)
            assert text == whole["choices"][0]["message"]["content"]
        else:
            text = "".join(choice["text"] for choice in choices)
            assert text == whole["choices"][0]["text"]


async def test_usage_in_a_stream(http: httpx.AsyncClient) -> None:
    chunks = await events(http, CHAT, stream_options={"include_usage": True})
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4

    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        chunk["usage"]["completion_tokens"]
        for chunk in await events(http, CHAT, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[0] < 4 == counts[-1]


async def test_cached_prompt_tokens(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.script = [SequenceOutput(1, [1000], finish="stop", cached_tokens=3)]
    body = await ok(http, CHAT)
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_several_prompts_are_choices_in_order(
    http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    ids = [tokenizer.encode(text, add_special_tokens=True) for text in ("One", "Two", "Three")]
    expected = [tokenizer.decode(fake_tokens("", one, 5, 4)) for one in ids]
    for prompt in (["One", "Two", "Three"], ids):
        body = await ok(http, TEXT, prompt=prompt, seed=5)
        assert [choice["text"] for choice in body["choices"]] == expected
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
        assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert body["usage"]["completion_tokens"] == 12
        texts = ["", "", ""]
        for chunk in await events(http, TEXT, prompt=prompt, seed=5):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == expected


async def test_samples_of_several_prompts(
    http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    """Choices are numbered prompt by prompt, as OpenAI does; an echo is in each."""
    more: dict[str, Any] = {"prompt": ["One", "Two"], "n": 2, "seed": 5}
    body = await ok(http, TEXT, echo=True, logprobs=1, **more)
    texts = [choice["text"] for choice in body["choices"]]
    assert [text[:3] for text in texts] == ["One", "One", "Two", "Two"]
    assert len(set(texts)) == 4
    for choice in body["choices"]:
        found = choice["logprobs"]
        assert found["token_logprobs"].count(None) == 1
        assert (
            len(found["tokens"])
            == len(found["text_offset"])
            == 4 + len(tokenizer.encode(choice["text"][:3], add_special_tokens=True))
        )
    assert body["usage"]["completion_tokens"] == 16
    streamed = ["", "", "", ""]
    ends = set()
    for chunk in await events(http, TEXT, echo=True, **more):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
            if choice["finish_reason"]:
                ends.add(choice["index"])
    assert streamed == texts
    assert ends == {0, 1, 2, 3}


async def test_samples_of_a_chat(http: httpx.AsyncClient) -> None:
    whole = await ok(http, CHAT, n=2, seed=5)
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    roles, texts = [], ["", ""]
    for chunk in await events(http, CHAT, n=2, seed=5):
        for choice in chunk["choices"]:
            roles += [choice["index"]] * ("role" in choice["delta"])
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert sorted(roles) == [0, 1]
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


async def test_max_tokens_of_a_chat_is_a_bound(front: Front, http: httpx.AsyncClient) -> None:
    """opencode and qwen-code ask for 32,000, whatever the context is."""
    for limit in (
        {"max_tokens": 32_000},
        {"max_tokens": None, "max_completion_tokens": 32_000},
    ):
        answer = await ok(http, CHAT, **limit)
        asked = front.engine.submitted[-1]
        assert asked.max_tokens == CONTEXT - len(asked.prompt)
        assert answer["choices"][0]["finish_reason"] == "length"
    answer = await post(http, CHAT, messages=[{"role": "user", "content": "long " * CONTEXT}])
    assert error_of(answer)["code"] == "context_length_exceeded"
    answer = await post(http, TEXT, max_tokens=32_000)
    assert error_of(answer)["code"] == "context_length_exceeded", "a completion is as vLLM's"


async def test_one_bad_prompt_refuses_all(front: Front, http: httpx.AsyncClient) -> None:
    answer = await post(http, TEXT, prompt=["fine", "long " * CONTEXT])
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "context_length_exceeded"
    await until(lambda: front.engine.in_flight == 0)


# ------------------------------------------------------------------ log-probabilities


def scripted(
    *tokens: tuple[int, float, list[tuple[int, float]]],
) -> list[SequenceOutput | VeneerError]:
    """A sequence of (token, its log-probability, the likely ones beside it)."""
    return [
        SequenceOutput(
            1,
            [token],
            logprobs=[logprob],
            top_logprobs=[tops],
            finish="stop" if at == len(tokens) - 1 else None,
        )
        for at, (token, logprob, tops) in enumerate(tokens)
    ]


async def test_logprobs_of_a_chat(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    [the_id] = tokenizer.encode(" the", add_special_tokens=False)
    end = 2  # <|im_end|>
    half = next(t for t in range(1000) if tokenizer.token_bytes(t) == b"\xe2\x80")
    front.engine.script = scripted(
        (the_id, -0.5, [(the_id, -0.5), (end, -2.0)]), (half, -1.0, []), (end, -0.25, [])
    )
    choice = (await ok(http, CHAT, logprobs=True))["choices"][0]
    the, broken, last = choice["logprobs"]["content"]
    assert the["token"] == " the"
    assert the["bytes"] == list(b" the")
    assert the["logprob"] == -0.5
    assert [(top["token"], top["logprob"]) for top in the["top_logprobs"]] == [
        (" the", -0.5),
        ("<|im_end|>", -2.0),
    ]
    assert broken["token"] == "bytes:\\xe2\\x80"
    assert broken["bytes"] == [0xE2, 0x80]
    assert (last["token"], last["bytes"]) == ("<|im_end|>", None)

    streamed = [
        entry
        for chunk in await events(http, CHAT, logprobs=True)
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert streamed == [the, broken, last]


async def test_logprobs_and_echo_of_a_completion(
    http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    new = fake_tokens("", ids, 7, 4)
    body = await ok(http, TEXT, echo=True, logprobs=0, seed=7)
    choice = body["choices"][0]
    text = choice["text"]
    assert text == "Hello there" + tokenizer.decode(new)
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(ids) + 4
    assert found["token_logprobs"] == [None, *[-1.0] * (len(ids) - 1), *[-0.5] * 4]
    assert found["top_logprobs"][0] is None
    assert found["top_logprobs"][-1] == {found["tokens"][-1]: -0.5}
    assert found["text_offset"][0] == 0
    for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
        if not token.startswith("bytes:"):
            assert text[offset:].startswith(token)

    streamed = await events(http, TEXT, echo=True, logprobs=0, seed=7)
    assert "".join(c["text"] for e in streamed for c in e["choices"]) == text
    offsets = [o for e in streamed for c in e["choices"] for o in c["logprobs"]["text_offset"]]
    assert offsets == found["text_offset"]


async def test_offsets_count_a_character_of_several_tokens_once(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("a😀b", add_special_tokens=False)
    assert len(ids) > 3, "else it says nothing"
    front.engine.script = scripted(*((token, -1.0, []) for token in ids))
    choice = (await ok(http, TEXT, logprobs=0))["choices"][0]
    assert choice["text"] == "a😀b"
    assert choice["logprobs"]["text_offset"] == [0, *[1] * (len(ids) - 2), 2]

    # Half of one that never ends is a character of its own, and an end has no text.
    front.engine.script = scripted(
        *((token, -1.0, []) for token in (ids[0], *ids[:2], ids[-1], 2))
    )
    choice = (await ok(http, TEXT, logprobs=0))["choices"][0]
    assert choice["text"] == "aa\ufffdb"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4]


async def test_offset_of_a_token_that_follows_a_broken_character(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    """It ends within a character itself: its own bytes have shown less than they will."""
    wanted = (b"\xf0\x9f", b" \xf0\x9f\x98", b"b")
    ids = [
        next(t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) == data)
        for data in wanted
    ]
    front.engine.script = scripted(*((token, -1.0, []) for token in ids))
    choice = (await ok(http, TEXT, logprobs=0))["choices"][0]
    assert choice["text"] == "\ufffd \ufffdb"
    assert choice["logprobs"]["text_offset"] == [0, 1, 3]


@pytest.mark.parametrize("prompt", ["<|im_start|>Ü 😀<|im_end|>\n", "😀"])
async def test_offsets_of_an_echo(
    http: httpx.AsyncClient, tokenizer: TextTokenizer, prompt: str
) -> None:
    """Special tokens are in a prompt that was sent as text, and not in one of ids."""
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    for given in (prompt, ids):
        choice = (await ok(http, TEXT, prompt=given, echo=True, logprobs=0, seed=7))["choices"][
            0
        ]
        shown = prompt if given is prompt else tokenizer.decode(ids)
        assert choice["text"].startswith(shown)
        found = choice["logprobs"]
        for token, offset in zip(found["tokens"], found["text_offset"], strict=True):
            if not token.startswith("bytes:") and (
                given is prompt or not token.startswith("<|")
            ):
                assert choice["text"][offset:].startswith(token)
        new = fake_tokens("", ids, 7, 4)
        starts = [len(shown) + len(tokenizer.decode(new[:at])) for at in range(4)]
        assert found["text_offset"][len(ids) :] == starts


async def test_fragments_of_characters_have_names_of_their_own(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    """As OpenAI's legacy API names them: asked for three, one gets three."""
    fragments = {
        data: next(t for t in range(tokenizer.vocab_size) if tokenizer.token_bytes(t) == data)
        for data in (b"\xe2", b"\xe2\x80", b"\xf0\x9f")
    }
    tops = [(token, -0.5 - at) for at, token in enumerate(fragments.values())]
    chosen = fragments[b"\xf0\x9f"]
    front.engine.script = scripted((chosen, -2.5, tops))
    body = await ok(http, TEXT, logprobs=3)
    found = body["choices"][0]["logprobs"]
    assert found["tokens"] == ["bytes:\\xf0\\x9f"]
    assert found["top_logprobs"] == [
        {"bytes:\\xe2": -0.5, "bytes:\\xe2\\x80": -1.5, "bytes:\\xf0\\x9f": -2.5}
    ]
    body = await ok(http, CHAT, logprobs=True, top_logprobs=3)
    [entry] = body["choices"][0]["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == ("bytes:\\xf0\\x9f", [0xF0, 0x9F])
    assert [(top["token"], top["bytes"]) for top in entry["top_logprobs"]] == [
        ("bytes:" + "".join(f"\\x{byte:02x}" for byte in data), list(data))
        for data in fragments
    ]


# ----------------------------------------------------------------- models and adapters


async def test_models_are_the_base_and_its_adapters(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    pushed = {
        name: (await front.push(make_adapter(tmp_path / name, seed=at), name)).adapter
        for at, name in enumerate(("sql", "chat"))
    }
    listed = (await http.get("/v1/models")).json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == [BASE, "chat", "sql"]
    base, _, sql = listed["data"]
    assert (base["parent"], base["root"], base["object"]) == (None, BASE, "model")
    assert base["max_model_len"] == CONTEXT
    assert sql["parent"] == BASE
    assert sql["revision"] == pushed["sql"].revision
    assert sql["root"] == f"sql@{sql['revision'][:12]}"
    assert abs(sql["created"] - pushed["sql"].created.seconds) <= 1
    for model in (BASE, "sql"):
        one = (await http.get(f"/v1/models/{model}")).json()
        assert one in listed["data"]
    pinned = f"sql@{sql['revision'][:12]}"
    assert (await http.get(f"/v1/models/{pinned}")).json() == {**sql, "id": pinned}
    missing = await http.get("/v1/models/sqll")
    assert missing.status_code == 404
    assert error_of(missing)["code"] == "model_not_found"


@pytest.mark.parametrize("page", [1, 2, 3, 4])
async def test_a_list_of_several_pages_has_them_all(
    page: int,
    front: Front,
    http: httpx.AsyncClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for at, name in enumerate(("sql", "chat", "code")):
        await front.push(make_adapter(tmp_path / name, seed=at), name)
    whole = await http.get("/v1/models")
    monkeypatch.setattr(models, "PAGE", page)
    assert (await http.get("/v1/models")).json() == whole.json()
    assert [model["id"] for model in whole.json()["data"]] == [BASE, "chat", "code", "sql"]


async def test_a_reader_that_stops_holds_a_little_of_a_long_list(
    front: Front, http: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of 100 slow readers held 3 MB."""
    await front.push(make_adapter(tmp_path / "one"), "one")
    real = Registry.list
    made: list[str] = []

    def many(
        registry: Registry, *, after: str = "", limit: int, **filters: Any
    ) -> tuple[AdapterRecord, ...]:
        """FAKE: 10,000 adapters of one content."""
        (one,) = real(registry)
        made.append(after)
        begin = int(after[1:]) + 1 if after else 0
        names = [f"n{at:06}" for at in range(begin, min(begin + limit, 10_000))]
        return tuple(replace(one, ref=replace(one.ref, name=name)) for name in names)

    monkeypatch.setattr(Registry, "list", many)
    host, port = front.addresses["openai"].rsplit(":", 1)
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
        await until(lambda: bool(made))
        listed = (await http.get("/v1/models")).json()["data"]
        monkeypatch.undo()
        assert len({model["id"] for model in listed}) == 10_001
        whole = 10_000 // models.PAGE + 1
        assert len(made) < 1.5 * whole, "the one that does not read got part of it"


async def test_the_model_names_the_adapter_and_headers_its_weights(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    pushed = (await front.push(make_adapter(tmp_path / "a"), "style")).adapter
    headers = {
        "veneer-revision": pushed.revision,
        "veneer-weights-digest": pushed.weights_digest,
    }
    for model, stream, tier in (
        ("style", False, "disk"),
        ("style", True, "device"),
        (f"style@{pushed.revision[:12]}", False, "device"),
    ):
        answer = await post(http, CHAT, model=model, stream=stream)
        assert answer.headers["veneer-adapter-tier"] == tier
        assert headers.items() <= dict(answer.headers).items()
    assert front.engine.submitted[-1].adapter.weights_digest == pushed.weights_digest

    answer = await post(http, CHAT, model="stile")
    assert answer.status_code == 404
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "style" in error["message"]


async def test_a_developer_message_is_a_system_message(
    front: Front, http: httpx.AsyncClient, tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    """Templates that name the roles they know leave out all others without a word."""
    template = (
        "{% for m in messages %}{% if m.role in ('system', 'user') %}"
        "[{{ m.role }}] {{ m.content }} {% endif %}{% endfor %}"
    )
    await front.push(make_adapter(tmp_path / "a", template=template), "strict")
    messages = [
        {"role": "developer", "content": "Answer in French."},
        {"role": "user", "content": "Hi"},
    ]
    await ok(http, CHAT, model="strict", messages=messages)
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert prompt == "[system] Answer in French. [user] Hi "
