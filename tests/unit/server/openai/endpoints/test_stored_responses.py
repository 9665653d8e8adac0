"""Stored responses and conversations, as OpenAI's client and programs use them."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import closing, contextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from openai import AsyncOpenAI, BadRequestError, NotFoundError
from openai.types.responses import Response
from veneer_registry.errors import EngineFailed, InvalidField
from veneer_server.openai.extensions import Ignored
from veneer_server.openai.fields import RequestFields, parse_fields
from veneer_server.openai.responses import ConversationFields, ResponseFields, messages_of
from veneer_server.wire.messages import SequenceOutput

from tests.refused import refused
from tests.unit.server.openai.endpoints.response_kit import ASK, respond, streamed
from tests.unit.server.openai.kit import BASE, CHAT, error_of, ok
from tests.unit.server.openai.tool_kit import long_context
from tests.unit.server.rpc.front_harness import Front, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOOLS: Any = [
    {
        "type": "function",
        "name": "look",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    }
]


@pytest_asyncio.fixture(loop_scope="module", autouse=True)
async def _long(front: Front) -> AsyncIterator[None]:
    async with long_context(front):
        yield


@pytest_asyncio.fixture(loop_scope="module")
async def openai(front: Front) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=f"http://{front.addresses['openai']}/v1",
        api_key="unused",
        max_retries=0,
        http_client=httpx.AsyncClient(trust_env=False),
    ) as client:
        yield client


async def prompt_of(front: Front, http: httpx.AsyncClient, *messages: tuple[str, str]) -> Any:
    """The token ids of a chat."""
    said = [{"role": role, "content": text} for role, text in messages]
    await ok(http, CHAT, messages=said)
    return front.engine.submitted[-1].prompt


# -------------------------------------------------------------------- stored responses


async def test_a_response_is_stored_unless_the_caller_says_no(openai: AsyncOpenAI) -> None:
    """Agent Framework sets nothing; openai-agents neither."""
    made = await openai.responses.create(model=BASE, input="Hi", max_output_tokens=4)
    assert made.store is True
    again = await openai.responses.retrieve(made.id)
    assert again == made
    without = await openai.responses.create(
        model=BASE, input="Hi", max_output_tokens=4, store=False
    )
    assert without.store is False
    for use in (
        openai.responses.retrieve(without.id),
        openai.responses.input_items.list(without.id),
        openai.responses.delete(without.id),
        openai.responses.create(model=BASE, input="And?", previous_response_id=without.id),
    ):
        with pytest.raises(NotFoundError) as missing:
            await use
        assert without.id in missing.value.message
    assert missing.value.code == "previous_response_not_found"
    assert missing.value.param == "previous_response_id"


async def test_what_was_said_before_goes_before(
    front: Front, http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    """Instructions do not carry over: only those of the request itself count."""
    options: Any = {"model": BASE, "max_output_tokens": 4, "temperature": 0}
    first = await openai.responses.create(
        **options, input="My name is Ann.", instructions="Be brief."
    )
    second = await openai.responses.create(
        **options, input="Hello", previous_response_id=first.id, instructions="Rhyme."
    )
    assert second.previous_response_id == first.id
    third = await openai.responses.create(
        **options,
        input=[{"role": "user", "content": "Who am I?"}],
        previous_response_id=second.id,
    )
    prompt = front.engine.submitted[-1].prompt
    turns = [
        ("user", "My name is Ann."),
        ("assistant", first.output_text),
        ("user", "Hello"),
        ("assistant", second.output_text),
        ("user", "Who am I?"),
    ]
    assert prompt == await prompt_of(front, http, *turns)
    assert third.usage is not None
    assert third.usage.input_tokens == len(prompt)
    items = [item async for item in openai.responses.input_items.list(third.id, order="asc")]
    assert [item.content[0].text for item in items if item.type == "message"] == [
        text for _, text in turns
    ]
    newest = await openai.responses.input_items.list(third.id, limit=1)
    assert [item.content[0].text for item in newest.data] == ["Who am I?"]
    assert newest.has_more
    paged = openai.responses.input_items.list(third.id, limit=2)
    assert len([item async for item in paged]) == 5


async def test_a_stream_is_stored_before_its_end_is_sent(
    front: Front, openai: AsyncOpenAI
) -> None:
    front.engine.script = [SequenceOutput(1, [1000]), SequenceOutput(1, [1001], finish="stop")]
    async with openai.responses.stream(model=BASE, input="Hi", max_output_tokens=4) as stream:
        async for event in stream:
            if event.type == "response.created":
                assert event.response.store is True
            if event.type == "response.completed":
                again = await openai.responses.retrieve(event.response.id)
                assert again.output_text == event.response.output_text
    assert (await stream.get_final_response()).store is True


async def test_calls_and_results_carry_over(
    front: Front, http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    """openai-agents sends only the result when a call's response is the previous one."""
    front.engine.script = [SequenceOutput(1, [1000], finish="stop")]
    first = await openai.responses.create(
        model=BASE,
        tools=TOOLS,
        input=[
            {"role": "user", "content": "Look."},
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
        ],
    )
    front.engine.script = None
    options: Any = {"model": BASE, "tools": TOOLS, "max_output_tokens": 4}
    result: Any = [{"type": "function_call_output", "call_id": "c1", "output": "a cat"}]
    await openai.responses.create(**options, input=result, previous_response_id=first.id)
    continued = front.engine.submitted[-1].prompt
    await openai.responses.create(
        **options,
        store=False,
        input=[
            {"role": "user", "content": "Look."},
            {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"},
            *[item.model_dump(exclude_none=True) for item in first.output],
            *result,
        ],
    )
    assert front.engine.submitted[-1].prompt == continued


async def test_an_item_may_stand_for_a_stored_one(
    front: Front, http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    """The AI SDK sends an assistant's turns so, unless it is told that nothing is stored."""
    options: Any = {"model": BASE, "max_output_tokens": 4}
    first = await openai.responses.create(**options, input="Hello")
    given: Any = [
        {"role": "user", "content": "Hello"},
        {"type": "item_reference", "id": first.output[0].id},
        {"role": "user", "content": "And?"},
    ]
    second = await openai.responses.create(**options, input=given)
    prompt = front.engine.submitted[-1].prompt
    said = [("user", "Hello"), ("assistant", first.output_text), ("user", "And?")]
    assert prompt == await prompt_of(front, http, *said)
    counted = await openai.responses.input_tokens.count(model=BASE, input=given)
    assert counted.input_tokens == len(prompt)
    items = [i async for i in openai.responses.input_items.list(second.id, order="asc")]
    assert [item.content[0].text for item in items if item.type == "message"] == [
        text for _, text in said
    ]
    with pytest.raises(NotFoundError) as missing:
        await openai.responses.create(
            **options, input=[{"type": "item_reference", "id": "msg_0123_0"}]
        )
    assert (missing.value.code, missing.value.param) == ("item_not_found", "input")


async def test_deleting(openai: AsyncOpenAI) -> None:
    first = await openai.responses.create(model=BASE, input="Hi", max_output_tokens=2)
    second = await openai.responses.create(
        model=BASE, input="And?", previous_response_id=first.id, max_output_tokens=2
    )
    await openai.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        await openai.responses.retrieve(first.id)
    with pytest.raises(NotFoundError):
        await openai.responses.create(model=BASE, input="x", previous_response_id=first.id)
    third = await openai.responses.create(
        model=BASE, input="More", previous_response_id=second.id, max_output_tokens=2
    )
    assert len([i async for i in openai.responses.input_items.list(third.id)]) == 5


async def test_log_probabilities_are_not_stored(http: httpx.AsyncClient) -> None:
    made = await respond(http, include=["message.output_text.logprobs"], top_logprobs=2)
    assert made["output"][0]["content"][0]["logprobs"]
    again = await http.get(f"/v1/responses/{made['id']}")
    assert again.json()["output"][0]["content"][0]["logprobs"] == []
    refused = await http.get(
        f"/v1/responses/{made['id']}", params={"include[]": "message.output_text.logprobs"}
    )
    assert (refused.status_code, error_of(refused)["param"]) == (400, "include")


async def test_ids_are_no_callers_choice(http: httpx.AsyncClient) -> None:
    """Proxies and strangers choose request ids: one must not find, or overwrite, another's."""
    asked = {"x-request-id": "one"}
    first, second = [
        (await http.post("/v1/responses", json=ASK, headers=asked)).json()["id"] for _ in "ab"
    ]
    assert first != second
    assert (await http.get("/v1/responses/resp_one")).status_code == 404


async def test_what_ends_early_is_not_stored(front: Front, http: httpx.AsyncClient) -> None:
    front.engine.script = [SequenceOutput(1, [1000]), EngineFailed("it ended; retry")]
    events = await streamed(http)
    failed = events[-1]["response"]
    assert (failed["status"], failed["store"]) == ("failed", False)
    assert (await http.get(f"/v1/responses/{failed['id']}")).status_code == 404
    front.engine.script = None
    front.engine.pace = asyncio.Semaphore(1)
    async with http.stream("POST", "/v1/responses", json={**ASK, "stream": True}) as answer:
        lines = answer.aiter_lines()
        await anext(lines)
        created = json.loads((await anext(lines)).removeprefix("data: "))
    await until(lambda: front.engine.in_flight == 0)
    gone = await http.get(f"/v1/responses/{created['response']['id']}")
    assert gone.status_code == 404


async def test_a_cut_answer_is_stored(http: httpx.AsyncClient) -> None:
    made = await respond(http)
    assert made["status"] == "incomplete"
    again = (await http.get(f"/v1/responses/{made['id']}")).json()
    assert again == made
    Response.model_validate(again)


@contextmanager
def failing(front: Front, table: str = "responses") -> Iterator[None]:
    """A disk that takes nothing for a table."""
    path = front.data_dir / "responses.sqlite"
    with closing(sqlite3.connect(path)) as db:
        db.execute(
            f"CREATE TRIGGER fails BEFORE INSERT ON {table} "
            "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
        try:
            yield
        finally:
            db.execute("DROP TRIGGER fails")


async def test_a_failing_disk_does_not_take_the_answer(
    front: Front, http: httpx.AsyncClient
) -> None:
    first = await respond(http)
    with failing(front):
        whole = await respond(http)
        events = await streamed(http)
        continued = await respond(http, previous_response_id=first["id"])
    assert [whole["store"], continued["store"]] == [False, False]
    assert whole["output"][0]["content"][0]["text"]
    assert events[0]["response"]["store"] is True, "nobody knew yet"
    assert events[-1]["response"]["store"] is False
    for made in (whole, continued, events[-1]["response"]):
        assert (await http.get(f"/v1/responses/{made['id']}")).status_code == 404
    assert "veneer_responses_not_stored_total 3.0" in await front.metrics()
    assert (await respond(http, previous_response_id=first["id"]))["store"] is True


async def test_a_conversation_misses_no_turn_in_silence(
    front: Front, openai: AsyncOpenAI, http: httpx.AsyncClient
) -> None:
    """One that were continued without a turn would look as if all were well."""
    talk = await openai.conversations.create()
    with failing(front, "items"):
        refused = await http.post("/v1/responses", json={**ASK, "conversation": talk.id})
        events = await streamed(http, conversation=talk.id)
    assert refused.status_code == 503
    assert events[-1]["type"] == "response.failed"
    assert [item async for item in openai.conversations.items.list(talk.id)] == []


async def test_bytes_and_number_are_metrics(front: Front, http: httpx.AsyncClient) -> None:
    def number(page: str, name: str) -> float:
        (line,) = [line for line in page.splitlines() if line.startswith(f"{name} ")]
        return float(line.split()[1])

    await respond(http)
    before = await front.metrics()
    made = await respond(http, input="x" * 4000)
    after = await front.metrics()
    count, size = "veneer_stored_responses", "veneer_stored_responses_bytes"
    assert number(after, count) == number(before, count) + 1
    assert number(after, size) > number(before, size)
    assert (await http.delete(f"/v1/responses/{made['id']}")).json() == {
        "id": made["id"],
        "object": "response",
        "deleted": True,
    }
    assert number(await front.metrics(), count) == number(before, count)


@pytest.mark.parametrize(
    ("fields", "param", "status"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", 404),
        ({"previous_response_id": ""}, "previous_response_id", 400),
        ({"previous_response_id": "x" * 129}, "previous_response_id", 400),
        ({"previous_response_id": "resp_\u0000'; --"}, "previous_response_id", 404),
        ({"conversation": "conv_1"}, "conversation", 404),
        ({"conversation": {"id": "conv_1"}}, "conversation", 404),
        ({"conversation": {"name": "conv_1"}}, "conversation", 400),
        ({"conversation": 7}, "conversation", 400),
        ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "conversation", 400),
        ({"previous_response_id": "resp_1", "input": []}, "input", 400),
        ({"prompt": {"id": "p"}}, "prompt", 400),
        ({"store": "yes"}, "store", 400),
    ],
)
async def test_what_cannot_be_continued_is_said(
    front: Front, http: httpx.AsyncClient, fields: dict[str, Any], param: str, status: int
) -> None:
    answer = await http.post("/v1/responses", json={**ASK, **fields})
    assert answer.status_code == status, answer.text
    assert (error_of(answer)["param"] or "").startswith(param)
    assert not front.engine.submitted


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("input_items?limit=0", "limit"),
        ("input_items?limit=101", "limit"),
        ("input_items?limit=many", "limit"),
        ("input_items?order=up", "order"),
        ("input_items?after=nosuch", "after"),
        ("?stream=true", "stream"),
    ],
)
async def test_a_bad_page_is_named(http: httpx.AsyncClient, path: str, param: str) -> None:
    made = await respond(http)
    slash = "" if path.startswith("?") else "/"
    answer = await http.get(f"/v1/responses/{made['id']}{slash}{path}")
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)


async def test_a_new_item_is_named_by_its_place_in_the_request(
    http: httpx.AsyncClient,
) -> None:
    first = await respond(http)
    answer = await http.post(
        "/v1/responses",
        json={**ASK, "previous_response_id": first["id"], "input": [{"role": "nobody"}]},
    )
    assert error_of(answer)["param"] == "input[0].role"


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
async def test_too_many_references_are_refused_before_any_is_read(
    http: httpx.AsyncClient, path: str
) -> None:
    given = [{"type": "item_reference", "id": "msg_0123_0"}] * 4097
    answer = await http.post(path, json={"model": BASE, "input": given})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "input")


async def test_what_is_stored_has_no_unknown_fields(
    http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    """They were told when they came; a later turn is another request."""
    given = [{"role": "user", "content": "Hi", "mood": "glad"}]
    first = await http.post("/v1/responses", json={**ASK, "input": given})
    assert first.headers["veneer-ignored"] == "input[].mood"
    again = {**ASK, "previous_response_id": first.json()["id"]}
    second = await http.post("/v1/responses", json=again)
    assert second.status_code == 200
    assert "veneer-ignored" not in second.headers
    strict = Ignored("refuse")
    said = messages_of("And?", None, [{"type": "message", **given[0]}], strict)
    assert [each["content"] for each in said] == ["Hi", "And?"]
    with refused(InvalidField, field="input[0].mood"):
        messages_of(given, None, given, strict)


@pytest.mark.parametrize(
    ("kind", "body"),
    [(ResponseFields, {"model": "m", "input": "Hi"}), (ConversationFields, {})],
)
async def test_metadata_is_not_without_effect(
    kind: type[RequestFields], body: dict[str, Any]
) -> None:
    """It is stored, and repeated."""
    ignored = Ignored()
    parse_fields(kind, {**body, "metadata": {"a": "b"}}, ignored)
    assert not ignored.counts


async def test_a_long_history_is_bounded(front: Front, http: httpx.AsyncClient) -> None:
    """Half of 4 MiB in what no prompt shows; twice that cannot be continued."""
    hidden = {"type": "reasoning", "summary": [], "encrypted_content": "x" * (2 << 20)}
    given = [hidden, {"role": "user", "content": "Hi"}]
    first = await respond(http, input=given)
    second = await respond(http, input=given, previous_response_id=first["id"])
    answer = await http.post(
        "/v1/responses", json={**ASK, "previous_response_id": second["id"]}
    )
    assert (answer.status_code, error_of(answer)["param"]) == (400, "previous_response_id")
    assert (await http.get(f"/v1/responses/{second['id']}")).status_code == 200
    listed = await http.get(f"/v1/responses/{second['id']}/input_items?limit=100")
    assert len(listed.json()["data"]) == 5


# --------------------------------------------------------------------- input tokens


async def test_input_tokens_are_those_of_the_response(openai: AsyncOpenAI) -> None:
    options: Any = {"model": BASE, "instructions": "Be brief.", "tools": TOOLS}
    first = await openai.responses.create(**options, input="Hi", max_output_tokens=2)
    for more in (
        {"input": "Hi"},
        {"input": [{"role": "user", "content": "Hello there"}]},
        {"input": "And?", "previous_response_id": first.id},
    ):
        given: Any = more
        counted = await openai.responses.input_tokens.count(**options, **given)
        made = await openai.responses.create(**options, **given, max_output_tokens=2)
        assert made.usage is not None
        assert counted.object == "response.input_tokens"
        assert counted.input_tokens == made.usage.input_tokens
    before = await openai.responses.input_tokens.count(previous_response_id=first.id)
    assert before.input_tokens > 2, "of the base, as no model is named"
    with pytest.raises(BadRequestError):
        await openai.responses.input_tokens.count(model=BASE)
    with pytest.raises(NotFoundError) as missing:
        await openai.responses.input_tokens.count(model="nosuch", input="Hi")
    assert missing.value.code == "model_not_found"


# -------------------------------------------------------------------- conversations


async def test_a_conversation_grows_by_responses(
    front: Front, http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    talk = await openai.conversations.create(
        items=[{"role": "user", "content": "I am Ann."}], metadata={"a": "b"}
    )
    assert await openai.conversations.retrieve(talk.id) == talk
    assert talk.metadata == {"a": "b"}
    options: Any = {"model": BASE, "max_output_tokens": 4, "conversation": talk.id}
    first = await openai.responses.create(**options, input="Hello")
    assert first.conversation is not None
    assert first.conversation.id == talk.id
    second = await openai.responses.create(**options, input="Who am I?", store=False)
    prompt = front.engine.submitted[-1].prompt
    assert prompt == await prompt_of(
        front,
        http,
        ("user", "I am Ann."),
        ("user", "Hello"),
        ("assistant", first.output_text),
        ("user", "Who am I?"),
    )
    items = [item async for item in openai.conversations.items.list(talk.id, order="asc")]
    assert [item.content[0].text for item in items if item.type == "message"] == [
        "I am Ann.",
        "Hello",
        first.output_text,
        "Who am I?",
        second.output_text,
    ]
    assert items[2].id == first.output[0].id
    assert (await openai.responses.retrieve(first.id)).conversation == first.conversation
    with pytest.raises(NotFoundError):
        await openai.responses.retrieve(second.id)
    with pytest.raises(BadRequestError):
        await openai.responses.create(model=BASE, input="x", previous_response_id=first.id)
    updated = await openai.conversations.update(talk.id, metadata={"c": "d"})
    assert (updated.metadata, updated.created_at) == ({"c": "d"}, talk.created_at)
    unknown = await openai.conversations.with_raw_response.update(
        talk.id, metadata={"c": "d"}, extra_body={"frob": 1}
    )
    assert unknown.headers["veneer-ignored"] == "frob"
    gone = await openai.conversations.delete(talk.id)
    assert gone.deleted
    for use in (
        openai.conversations.retrieve(talk.id),
        openai.conversations.delete(talk.id),
        openai.conversations.items.list(talk.id),
        openai.responses.create(**options, input="x"),
    ):
        with pytest.raises(NotFoundError) as missing:
            await use
        assert missing.value.code == "conversation_not_found"


async def test_a_session_of_openai_agents(openai: AsyncOpenAI) -> None:
    """The calls of its `OpenAIConversationsSession`, in its order."""
    talk = (await openai.conversations.create(items=[])).id
    answer = await openai.responses.create(model=BASE, input="Hi", max_output_tokens=2)
    said: Any = [item.model_dump(exclude_unset=True) for item in answer.output]
    call: Any = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    result: Any = {"type": "function_call_output", "call_id": "c", "output": "a cat"}
    asked: Any = {"role": "user", "content": "Hi"}
    await openai.conversations.items.create(talk, items=[asked])
    await openai.conversations.items.create(talk, items=[*said, call])
    await openai.conversations.items.create(talk, items=[result])
    items = [
        item.model_dump(exclude_unset=True)
        async for item in openai.conversations.items.list(talk, order="asc")
    ]
    kinds = [item["type"] for item in items]
    assert kinds == ["message", "message", "function_call", "function_call_output"]
    assert items[1]["content"][0]["text"] == answer.output_text
    replayed: Any = items
    await openai.responses.create(
        model=BASE, input=[*replayed, asked], tools=TOOLS, max_output_tokens=2
    )
    last = [item async for item in openai.conversations.items.list(talk, limit=1)]
    assert len(last) == 4, "the SDK goes on to the next page"
    popped = (await openai.conversations.items.list(talk, limit=1, order="desc")).data[0]
    one = await openai.conversations.items.retrieve(popped.id or "", conversation_id=talk)
    assert one == popped
    await openai.conversations.items.delete(popped.id or "", conversation_id=talk)
    assert len([item async for item in openai.conversations.items.list(talk)]) == 3
    await openai.conversations.delete(talk)


@pytest.mark.parametrize(
    ("items", "param"),
    [
        ([], "items"),
        ([{"role": "user"}], "items[0].content"),
        ([{"type": "web_search_call"}], "items[0]"),
        (["Hi"], "items[0]"),
        ([{"role": "user", "content": "x"}] * 4097, "items"),
    ],
)
async def test_a_bad_item_is_named(
    http: httpx.AsyncClient, openai: AsyncOpenAI, items: list[Any], param: str
) -> None:
    talk = (await openai.conversations.create()).id
    answer = await http.post(f"/v1/conversations/{talk}/items", json={"items": items})
    assert (answer.status_code, error_of(answer)["param"]) == (400, param)
    assert [item async for item in openai.conversations.items.list(talk)] == []


async def test_a_conversation_of_eight_megabytes_is_refused_in_a_sentence(
    http: httpx.AsyncClient, openai: AsyncOpenAI
) -> None:
    talk = (await openai.conversations.create()).id
    large = {"items": [{"role": "user", "content": "x" * (3 << 20)}]}
    assert (await http.post(f"/v1/conversations/{talk}/items", json=large)).status_code == 200
    answer = await http.post(f"/v1/conversations/{talk}/items", json=large)
    assert (answer.status_code, error_of(answer)["param"]) == (400, "items")
    assert len((await openai.conversations.items.list(talk)).data) == 1
