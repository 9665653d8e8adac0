"""Ollama's API: chats and prompts as the same requests of other APIs, in its forms."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from veneer_proto.v1 import adapters_pb2 as pb
from veneer_registry.errors import EngineFailed
from veneer_server.openai.fields import IGNORED
from veneer_server.openai.ollama import NO_EFFECT, REFUSED, Options
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.places import REPOSITORY
from tests.unit.server.openai.kit import BASE, CHAT, TEXT, ok
from tests.unit.server.openai.tool_kit import TEMPLATES, long_context, outputs
from tests.unit.server.rpc.fake_engine import CONTEXT
from tests.unit.server.rpc.front_harness import Front, make_adapter

pytestmark = pytest.mark.asyncio(loop_scope="module")

ASK: dict[str, Any] = {"model": BASE, "messages": CHAT["messages"]}
FEW = {"num_predict": 4}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'


async def said(http: httpx.AsyncClient, path: str = "/api/chat", **more: Any) -> dict[str, Any]:
    asked = ASK if path == "/api/chat" else {"model": BASE, "prompt": "Hi"}
    answer = await http.post(path, json={**asked, "options": FEW, **more, "stream": False})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    found: dict[str, Any] = answer.json()
    return found


async def lines(http: httpx.AsyncClient, path: str = "/api/chat", **more: Any) -> list[Any]:
    """A stream, which is what a request gets that says nothing of it."""
    asked = ASK if path == "/api/chat" else {"model": BASE, "prompt": "Hi"}
    answer = await http.post(path, json={**asked, "options": FEW, **more})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    *each, last = answer.text.split("\n")
    assert last == ""
    return [json.loads(line) for line in each]


def joined(stream: list[Any]) -> dict[str, Any]:
    """What a client makes of a stream: texts and calls joined, the last line's counts."""
    assert [line["done"] for line in stream] == [False] * (len(stream) - 1) + [True]
    whole = dict(stream[-1])
    parts = [line.get("message", line) for line in stream]
    made: dict[str, Any] = {}
    for name in ("content", "response", "thinking"):
        if text := "".join(part.get(name, "") for part in parts):
            made[name] = text
    if calls := [call for part in parts for call in part.get("tool_calls", ())]:
        made["tool_calls"] = calls
    if "message" in whole:
        whole["message"] = {"role": "assistant", "content": "", **made}
    else:
        whole |= made
    if scores := [score for line in stream for score in line.get("logprobs", ())]:
        whole["logprobs"] = scores
    return whole


def same(answer: dict[str, Any]) -> dict[str, Any]:
    """Without what differs between two requests."""
    text = json.dumps({k: v for k, v in answer.items() if "duration" not in k})
    kept: dict[str, Any] = json.loads(text)
    kept.pop("created_at")
    for call in kept.get("message", kept).get("tool_calls", ()):
        call.pop("id")
    return kept


async def refusal(http: httpx.AsyncClient, path: str, status: int = 400, **fields: Any) -> str:
    """The error, in Ollama's form: clients show what is in it, so it must be a text."""
    answer = await http.post(path, json={"model": BASE, **fields})
    assert answer.status_code == status, answer.text
    (told,) = answer.json().items()
    assert told[0] == "error"
    assert isinstance(told[1], str)
    return str(told[1])


# ------------------------------------------------------------------------------ chats


async def test_a_chat_is_the_same_request(front: Front, http: httpx.AsyncClient) -> None:
    options = {"temperature": 0.5, "top_p": 0.9, "min_p": 0.1, "top_k": 3, "seed": 7}
    penalties = {"presence_penalty": 0.5, "frequency_penalty": -0.5}
    chat = await ok(http, CHAT, **options, **penalties, repetition_penalty=1.2, stop=["@"])
    expected = front.engine.submitted[-1]
    given = {**FEW, **options, **penalties, "repeat_penalty": 1.2, "stop": ["@"]}
    answer = await said(http, options={**given, "num_ctx": 8, "num_thread": 1})
    asked = front.engine.submitted[-1]
    assert (asked.prompt, asked.sampling) == (expected.prompt, expected.sampling)
    assert asked.max_tokens == expected.max_tokens == 4
    text = chat["choices"][0]["message"]["content"]
    assert answer["message"] == {"role": "assistant", "content": text}
    assert (answer["model"], answer["done"], answer["done_reason"]) == (BASE, True, "length")
    assert (answer["prompt_eval_count"], answer["eval_count"]) == (len(asked.prompt), 4)
    assert answer["total_duration"] >= answer["eval_duration"] >= 0
    assert same(joined(await lines(http, options=given))) == same(answer)


async def test_a_prompt_is_a_chat_unless_it_is_raw(
    front: Front, http: httpx.AsyncClient
) -> None:
    system = {"role": "system", "content": "Be brief."}
    await ok(http, CHAT, messages=[system, *CHAT["messages"]], seed=1)
    expected = front.engine.submitted[-1].prompt
    path, options = "/api/generate", {**FEW, "seed": 1}
    answer = await said(http, path, system="Be brief.", options=options)
    assert front.engine.submitted[-1].prompt == expected
    streamed = await lines(http, path, system="Be brief.", options=options)
    assert same(joined(streamed)) == same(answer)
    text = (await ok(http, TEXT, prompt="Hi", seed=1))["choices"][0]["text"]
    expected = front.engine.submitted[-1].prompt
    answer = await said(http, path, raw=True, options=options)
    assert front.engine.submitted[-1].prompt == expected
    assert answer["response"] == text


async def test_the_server_decides_how_long_an_answer_is_if_nobody_else_does(
    front: Front, http: httpx.AsyncClient
) -> None:
    for more in ({"options": {}}, {"options": {"num_predict": -1}}, {"options": None}):
        for path, raw in (("/api/chat", {}), ("/api/generate", {"raw": True})):
            await said(http, path, **more, **raw)
            asked = front.engine.submitted[-1]
            assert asked.max_tokens == CONTEXT - len(asked.prompt)


async def test_nothing_to_answer_loads_nothing_and_says_so(
    front: Front, http: httpx.AsyncClient
) -> None:
    for path, more in (
        ("/api/chat", {"messages": []}),
        ("/api/generate", {"prompt": "", "keep_alive": 0}),
        ("/api/generate", {"prompt": None, "keep_alive": "5m"}),
    ):
        answer = await said(http, path, **more)
        assert (answer["done"], answer["done_reason"]) == (True, "load")
        told = await refusal(http, path, 404, **{**more, "model": "none:latest"})
        assert "'none'" in told
    assert not front.engine.submitted


async def test_a_name_may_have_the_tag_that_clients_append(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    await front.push(make_adapter(tmp_path), "style")
    for name in ("style", "style:latest"):
        answer = await said(http, model=name)
        assert answer["model"] == name
        assert front.engine.submitted[-1].adapter is not None
        await ok(http, CHAT, model=name)
        assert front.engine.submitted[-1].adapter is not None
        assert (await http.get(f"/v1/models/{name}")).json()["rank"] >= 1
    await ok(http, CHAT, model=f"{BASE}:latest")
    assert front.engine.submitted[-1].adapter is None
    for wrong in ("style:7b", ":latest", "style:latest:latest", "x" * 300 + ":7b"):
        told = await refusal(http, "/api/chat", 404, **{**ASK, "model": wrong})
        assert wrong[:80] in told
        assert "GET /api/tags" in told
        assert told == await refusal(http, "/api/show", 404, model=wrong)


@pytest.mark.parametrize("step", [1, 5])
async def test_thinking_and_calls_come_in_parts_and_go_back(
    front: Front,
    http: httpx.AsyncClient,
    tokenizer: TextTokenizer,
    tmp_path: Path,
    step: int,
) -> None:
    template = TEMPLATES["hermes"] + "{# <think> #}"
    await front.push(make_adapter(tmp_path, template=template), "fam")
    each = list(outputs(tokenizer, f"<think>Hm 😀</think>\n\nLook.\n{CALL}\n{CALL}"))
    front.engine.script = [
        SequenceOutput(
            1,
            [token for one in each[at : at + step] for token in one.tokens],
            finish=each[at : at + step][-1].finish,
        )
        for at in range(0, len(each), step)
    ]
    more: dict[str, Any] = {"model": "fam", "tools": [WEATHER], "options": {}}
    async with long_context(front):
        answer = await said(http, **more)
        message = answer["message"]
        assert message["thinking"] == "Hm 😀"
        assert "Look." in message["content"]
        functions = [call["function"] for call in message["tool_calls"]]
        assert functions == [
            {"index": at, "name": "weather", "arguments": {"city": "Paris"}} for at in (0, 1)
        ]
        assert answer["done_reason"] == "stop"
        assert same(joined(await lines(http, **more))) == same(answer)
        # The Python client drops the ids.
        bare = [{"function": call["function"]} for call in message["tool_calls"]]
        turns = [
            *ASK["messages"],
            {**message, "tool_calls": bare},
            {"role": "tool", "tool_name": "weather", "content": "sunny"},
            {"role": "tool", "tool_name": "weather", "content": "rainy"},
        ]
        await said(http, **more, messages=turns)
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    assert prompt.index("sunny") < prompt.index("rainy")


async def test_results_belong_to_their_tools(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    shows = (
        "{% for m in messages %}{{ m.role }}:{{ m.tool_call_id }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}={{ c.id }} {% endfor %}"
        "{% endfor %}{# tools #}{{ '<tool_call>' if false }}"
    )
    await front.push(
        make_adapter(tmp_path, template=shows + "{% if tools %}{% endif %}"), "ids"
    )
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("a", "b", "b")]
    turns = [
        *ASK["messages"],
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_name": "b", "content": "2"},
        {"role": "tool", "tool_name": "b", "content": "3"},
        {"role": "tool", "content": "1"},
    ]
    async with long_context(front):
        await said(http, model="ids", messages=turns)
    prompt = tokenizer.decode(front.engine.submitted[-1].prompt)
    first, second, third = (f"c0001000{at}" for at in range(3))
    calls_shown = f"a={first} b={second} b={third} "
    results = f"tool:{second}tool:{third}tool:{first}"
    assert prompt == f"user:assistant:{calls_shown}{results}"


async def test_formats_hold_the_answer(front: Front, http: httpx.AsyncClient) -> None:
    for path, more in (
        ("/api/chat", {}),
        ("/api/generate", {}),
        ("/api/generate", {"raw": True}),
    ):
        await said(http, path, format=SCHEMA, **more)
        held = front.engine.submitted[-1].constraint
        assert held is not None
        assert json.loads(held.text) == SCHEMA
        await said(http, path, format="json", **more)
        held = front.engine.submitted[-1].constraint
        assert held is not None
        assert json.loads(held.text) == {"type": "object"}
        await said(http, path, format="", **more)
        assert front.engine.submitted[-1].constraint is None
    assert "json" in await refusal(http, "/api/chat", **{**ASK, "format": "xml"})


async def test_thinking_reaches_the_template(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    shows = "{{ enable_thinking }}/{{ reasoning_effort }}"
    await front.push(make_adapter(tmp_path, template=shows), "shows")
    for think, shown in ((True, "True/"), (False, "False/none"), ("high", "True/high")):
        await said(http, model="shows", think=think)
        assert tokenizer.decode(front.engine.submitted[-1].prompt) == shown


async def test_log_probabilities(front: Front, http: httpx.AsyncClient) -> None:
    for path, more in (
        ("/api/chat", {}),
        ("/api/generate", {}),
        ("/api/generate", {"raw": True}),
    ):
        answer = await said(http, path, logprobs=True, top_logprobs=2, **more)
        assert len(answer["logprobs"]) == 4
        for score in answer["logprobs"]:
            assert score.keys() == {"token", "logprob", "bytes", "top_logprobs"}
            assert len(score["top_logprobs"]) == 2
        stream = await lines(http, path, logprobs=True, top_logprobs=2, **more)
        assert len(joined(stream)["logprobs"]) == 4
        assert "logprobs" not in await said(http, path, **more)


async def test_a_stream_that_fails_says_so(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.script = [SequenceOutput(1, [1000]), EngineFailed("gone", retry_after_s=2.0)]
    *_, last = await lines(http)
    assert last == {"error": "gone"}


# --------------------------------------------------------------------------- refusals


MAX_TOKENS = ("max_tokens", "max_completion_tokens", "max_new_tokens", "n_predict")


def options(**given: Any) -> dict[str, Any]:
    return {"options": given}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (options(temperature=1000), "options.temperature"),
        (options(repeat_penalty=1000), "options.repeat_penalty"),
        (options(num_predict=-3), "options.num_predict"),
        (options(top_k="many"), "options.top_k"),
        (options(seed=-7), "options.seed"),
        (options(stop=[""]), "stop"),
        (options(temprature=1), "did you mean 'temperature'"),
        (options(**{"x" * 5000: 1}), "leave it out"),
        ({"options": "hot"}, "options"),
        *((options(**{name: 0.4711}), name) for name in REFUSED),
        ({"temperature": 1}, "send it in options"),
        ({"template": "{{ .Prompt }}"}, "template"),
        ({"images": ["aGk="]}, "only text"),
        ({"think": "very"}, "think"),
        ({"truncate": True}, "truncate"),
        ({"shift": True}, "shift"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"messages": [{"role": "usr", "content": "Hi"}]}, "did you mean user"),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "Hi", "images": ["a"]}]}, "images"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"modle": "a"}, "did you mean 'model'"),
        *(({name: 7}, "send options.num_predict") for name in MAX_TOKENS),
        ({"max_tokens": 0}, "send options.num_predict"),
        ({"response_format": {"type": "json_object"}}, "send format"),
    ],
)
async def test_a_bad_field_is_named(
    front: Front, http: httpx.AsyncClient, fields: dict[str, Any], says: str
) -> None:
    assert says in await refusal(http, "/api/chat", **{**ASK, **fields})
    assert not front.engine.submitted


async def test_what_other_apis_ignore_is_no_field_here(http: httpx.AsyncClient) -> None:
    for name in IGNORED:
        given: dict[str, Any] = {**ASK, name: ["any"]}
        told = await refusal(http, "/api/chat", **given)
        assert told.startswith(f"{name} is not supported")
    assert (await said(http, metadata={}, store=None))["done"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"context": [1, 2]}, "/api/chat"),
        ({"suffix": "x"}, "suffix"),
        ({"raw": True, "system": "x"}, "system"),
        ({"raw": True, "top_logprobs": 1}, "top_logprobs"),
        ({"raw": True, "prompt": "long " * 4000}, "tokens"),
        ({"prompt": 5}, "prompt"),
    ],
)
async def test_a_bad_field_of_a_prompt_is_named(
    front: Front, http: httpx.AsyncClient, fields: dict[str, Any], says: str
) -> None:
    assert says in await refusal(http, "/api/generate", **{"prompt": "Hi", **fields})
    assert not front.engine.submitted


async def test_what_changes_nothing_is_taken(front: Front, http: httpx.AsyncClient) -> None:
    neutral = {name: values[0] for name, (values, _) in REFUSED.items()}
    given = {**FEW, **neutral, **dict.fromkeys(NO_EFFECT, 3), "top_p": None, "seed": -1}
    await said(http, options=given, keep_alive=-1, images=[], truncate=False, template="")


async def test_errors_before_a_body_is_read_have_its_form(http: httpx.AsyncClient) -> None:
    for verb, path, status in (
        ("GET", "/api/chat", 405),
        ("POST", "/api/nothing", 404),
        ("POST", "/api/chat", 400),
    ):
        answer = await http.request(verb, path, content=b"{")
        assert answer.status_code == status
        assert isinstance(answer.json()["error"], str)


# ----------------------------------------------------------------------------- models


async def test_models_are_listed_shown_and_found_in_memory(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    pushed = await front.push(
        make_adapter(tmp_path, template=TEMPLATES["hermes"] + "{# <think> #}"), "style"
    )
    tags = (await http.get("/api/tags")).json()["models"]
    assert [tag["name"] for tag in tags] == [f"{BASE}:latest", "style:latest"]
    assert all(tag["name"] == tag["model"] for tag in tags)
    assert tags[1]["digest"] == pushed.adapter.revision
    assert tags[1]["details"]["parent_model"] == BASE
    for tag in tags:
        shown = (await http.post("/api/show", json={"name": tag["name"]})).json()
        assert shown["details"] == tag["details"]
        family = shown["model_info"]["general.architecture"]
        assert shown["model_info"][f"{family}.context_length"] == CONTEXT
        assert shown["capabilities"] == tag["capabilities"]
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    assert shown["template"].startswith(TEMPLATES["hermes"])
    running = (await http.get("/api/ps")).json()["models"]
    assert [each["name"] for each in running] == [f"{BASE}:latest"]
    await said(http, model="style")
    running = (await http.get("/api/ps")).json()["models"]
    assert [each["name"] for each in running] == [f"{BASE}:latest", "style:latest"]
    assert running[1]["expires_at"]
    assert "missing" in await refusal(http, "/api/show", model=None)
    assert "metadata" in await refusal(http, "/api/show", model="style", metadata={"a": 1})
    assert "'none'" in await refusal(http, "/api/show", 404, model="none")


async def test_what_is_in_memory_is_shown_as_the_revision_that_it_is(
    front: Front, http: httpx.AsyncClient, tmp_path: Path
) -> None:
    """The same name may by now mean another one, which is not in memory."""

    async def shown() -> dict[str, tuple[str, int]]:
        found = (await http.get("/api/ps")).json()["models"]
        return {each["name"]: (each["digest"], each["size"]) for each in found[1:]}

    old = (await front.push(make_adapter(tmp_path / "a"), "style")).adapter
    await said(http, model="style")
    before = (await shown())["style:latest"]
    assert before[0] == old.revision
    await front.adapters.UpdateAdapter(pb.UpdateAdapterRequest(name="style", retain=2))
    larger = make_adapter(tmp_path / "b", seed=1, rank=4)
    new = (await front.push(larger, "style", allow_replace=True)).adapter
    assert new.revision != old.revision
    was = f"style@{old.revision[:12]}:latest"
    await said(http, model="style")
    now = await shown()
    assert now.keys() == {was, "style:latest"}
    assert now[was] == before
    assert now["style:latest"][0] == new.revision
    await said(http, model=was)
    with damaged(front, new.revision):
        assert await shown() == {was: before}


@contextmanager
def damaged(front: Front, revision: str) -> Iterator[None]:
    """The row of a revision differs from its digest."""

    def change(by: int) -> None:
        with closing(sqlite3.connect(front.data_dir / "catalog.sqlite")) as catalog, catalog:
            row = "UPDATE revisions SET bytes = bytes + ? WHERE revision = ?"
            assert catalog.execute(row, (by, revision)).rowcount

    change(1)
    try:
        yield
    finally:
        change(-1)


async def test_a_server_is_there_and_does_not_claim_to_be_another(
    http: httpx.AsyncClient,
) -> None:
    for verb, text in (("GET", "Veneer is running"), ("HEAD", "")):
        answer = await http.request(verb, "/")
        assert (answer.status_code, answer.text) == (200, text)
    told = (await http.get("/api/version")).json()
    # Open WebUI takes the numbers apart.
    assert tuple(map(int, told["version"].split("."))) >= (0, 6, 4)
    assert told["veneer"]


async def test_the_page_lists_every_option() -> None:
    page = (REPOSITORY / "docs" / "ollama.md").read_text("utf-8")
    missing = [
        name
        for name in (*Options.model_fields, *NO_EFFECT, *REFUSED)
        if f"`{name}`" not in page
    ]
    assert not missing
