"""Answers that may become long: bounded before work begins, and made off the event loop."""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import httpx
import msgspec
import pytest
import pytest_asyncio
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import InvalidField, QueueFull
from veneer_server.access.caller import Caller
from veneer_server.openai.errors import HttpError
from veneer_server.openai.http.asgi import ABORT, Reply
from veneer_server.openai.http.body import Joined, Many, dump, written
from veneer_server.queues.fairness import NOBODY, Sender
from veneer_server.rpc import convert
from veneer_server.serving.answer_room import (
    MAX_ANSWER,
    AnswerForm,
    AnswerRoom,
    AnswerSize,
    ScoreForm,
)
from veneer_server.serving.checks import check_json_size
from veneer_server.serving.spare_time import MAX_WAITING, SpareTime
from veneer_server.text.tokenizer import TextTokenizer, TokenNames
from veneer_server.text.turns import longer_as_json

from tests.refused import refused
from tests.unit.server.openai.kit import BASE, CHAT, TEXT, error_of, events, ok, post
from tests.unit.server.rpc.fake_engine import FakeEngine
from tests.unit.server.rpc.front_harness import Front, failure, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

CONTEXT = 1 << 17


class LongEngine(FakeEngine):
    """FAKE, with the context of a larger model."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.info = msgspec.structs.replace(
            self.info, context_length=CONTEXT, longest_sequence=CONTEXT, kv_cache_tokens=CONTEXT
        )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def module_front(
    base_folder: Path, front_cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    data = tmp_path_factory.mktemp("long-answers")
    options = {"engine": LongEngine, "openai_listen": "127.0.0.1:0"}
    async with running(base_folder, front_cache, data, **options) as front:  # type: ignore[arg-type]
        yield front


def ids(count: int) -> list[int]:
    return [100 + at % 3000 for at in range(count)]


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({**TEXT, "prompt": ids(3000), "n": 16, "prompt_logprobs": 20}, "prompt_logprobs"),
        ({**TEXT, "prompt": ids(9000), "n": 16, "echo": True, "logprobs": 5}, "echo"),
        ({**TEXT, "prompt": [ids(900)] * 64, "prompt_logprobs": 20}, "prompt_logprobs"),
        (
            {**TEXT, "prompt": ids(9000), "n": 16, "echo": True, "logprobs": 5, "stream": True},
            "echo",
        ),
        ({**TEXT, "max_tokens": 30_000, "n": 4, "logprobs": 20}, "logprobs"),
        ({**CHAT, "max_tokens": 30_000, "logprobs": True, "top_logprobs": 20}, "top_logprobs"),
        (
            {**CHAT, "max_tokens": 30_000, "logprobs": True, "top_logprobs": 9, "stream": True}
            | {"n": 16},
            "top_logprobs",
        ),
    ],
)
async def test_an_answer_that_may_be_too_long_is_refused_before_work_begins(
    http: httpx.AsyncClient, front: Front, given: dict[str, Any], field: str
) -> None:
    answer = await post(http, given)
    assert answer.status_code == 400, answer.text[:200]
    error = error_of(answer)
    assert (error["code"], error["param"]) == ("invalid_field", field)
    assert str(MAX_ANSWER) in error["message"], "it says how much is allowed"
    assert not front.engine.submitted


async def test_a_response_repeats_its_scores_so_its_stream_has_less_room(
    http: httpx.AsyncClient, front: Front
) -> None:
    given = {"model": BASE, "input": "Hi", "top_logprobs": 20, "max_output_tokens": 4000}
    assert (await http.post("/v1/responses", json=given)).status_code == 200
    answer = await http.post("/v1/responses", json={**given, "stream": True})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "top_logprobs"


async def test_who_sets_no_length_gets_as_much_as_fits(
    http: httpx.AsyncClient, front: Front
) -> None:
    # The stop ends it: only the engine sees how much was allowed.
    front.engine.pace = asyncio.Semaphore(0)
    given = {key: value for key, value in CHAT.items() if key != "max_tokens"}
    for more, whole in (({}, True), ({"logprobs": True, "top_logprobs": 20}, False)):
        call = asyncio.ensure_future(post(http, given, **more))
        while not front.engine.submitted:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        [request] = front.engine.submitted
        front.engine.submitted.clear()
        assert (request.max_tokens == CONTEXT - len(request.prompt)) == whole
        assert request.max_tokens > 5000
        call.cancel()
        await asyncio.wait({call})
    front.engine.pace = None


class Threads:
    """Counts names of tokens that are looked up, by thread, as scores are written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: dict[int, int] = {}
        label = TextTokenizer.token_label

        def counted(tokenizer: TextTokenizer, token: int) -> str:
            here = threading.get_ident()
            self.counts[here] = self.counts.get(here, 0) + 1
            return label(tokenizer, token)

        monkeypatch.setattr(TextTokenizer, "token_label", counted)

    @property
    def on_the_loop(self) -> int:
        return self.counts.get(threading.get_ident(), 0)


@pytest.mark.parametrize("more", [{"prompt_logprobs": 5}, {"echo": True, "logprobs": 5}])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_s_scores_are_made_once_and_off_the_event_loop(
    http: httpx.AsyncClient,
    front: Front,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
    stream: bool,
) -> None:
    if stream and "prompt_logprobs" in more:
        pytest.skip("not streamed")
    given = {**TEXT, "prompt": ids(2000), "max_tokens": 1, **more}
    alone = await ok(http, {**given, "n": 1})
    threads = Threads(monkeypatch)
    if stream:
        chunks = await events(http, {**given, "n": 7})
        choices = {chunk["choices"][0]["index"]: chunk["choices"][0] for chunk in chunks}
    else:
        choices = {
            each["index"]: each for each in (await ok(http, {**given, "n": 7}))["choices"]
        }
    assert len(choices) == 7
    first = alone["choices"][0]
    for choice in choices.values():
        if "prompt_logprobs" in more:
            assert choice["prompt_logprobs"] == first["prompt_logprobs"]
            assert len(choice["prompt_logprobs"]) == 2000
        else:
            for member, shown in choice["logprobs"].items():
                assert shown[:2000] == first["logprobs"][member][:2000]
                assert len(shown) == 2001
    # Six names at each position, and the token's own once more among echoed ones.
    assert sum(threads.counts.values()) < 2 * 2000 * 8
    assert threads.on_the_loop < 200


async def test_long_scores_of_an_answer_are_made_off_the_event_loop(
    http: httpx.AsyncClient, front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    scored = {"logprobs": True, "top_logprobs": 3, "max_tokens": 1500}
    chat = await ok(http, CHAT, **scored)
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == 1500
    assert all(len(each["top_logprobs"]) == 3 for each in content)
    given = {"model": BASE, "input": "Hi", "top_logprobs": 3, "max_output_tokens": 1500}
    response = (await http.post("/v1/responses", json=given)).json()
    assert len(response["output"][0]["content"][0]["logprobs"]) == 1500
    assert threads.on_the_loop < 200
    assert sum(threads.counts.values()) >= 2 * 1500 * 4


async def test_token_ids_of_a_long_prompt_are_in_each_choice(
    http: httpx.AsyncClient, front: Front
) -> None:
    given = {**TEXT, "prompt": ids(50_000), "n": 3, "return_token_ids": True}
    for choice in (await ok(http, given))["choices"]:
        assert choice["prompt_token_ids"] == ids(50_000)
        assert len(choice["token_ids"]) == 4


# -------------------------------------------------------------------------------- gRPC


def scored(count: int, tops: int, **fields: Any) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids(count)),
        output=inference_pb2.OutputOptions(prompt_logprobs=tops, **fields),
        stopping=inference_pb2.StoppingOptions(max_tokens=2),
    )


async def test_grpc_streams_a_long_prompt_s_scores_in_messages_that_clients_take(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    refused = await failure(front.inference.Generate(scored(10_000, 20)))
    assert refused.reason == "INVALID_FIELD"
    assert refused.metadata["field"] == "output.prompt_logprobs"
    assert "GenerateStream" in refused.message
    assert not front.engine.submitted
    found: list[inference_pb2.TokenLogprob] = []
    tokens: list[int] = []
    async for message in front.inference.GenerateStream(scored(10_000, 20)):
        assert message.ByteSize() < 1 << 20
        assert not (tokens and message.prompt_logprobs), "they come first"
        found += message.prompt_logprobs
        tokens += message.token_ids
    assert [each.token_id for each in found] == ids(10_000)[1:]
    assert all(len(each.top) == 20 and each.rank for each in found)
    assert len(tokens) == 2
    assert threads.on_the_loop < 200


async def test_grpc_sends_a_whole_answer_with_many_scores(front: Front) -> None:
    answer = await front.inference.Generate(scored(1000, 20))
    assert [each.token_id for each in answer.prompt_logprobs] == ids(1000)[1:]
    assert all(len(each.top) == 20 for each in answer.prompt_logprobs)


async def test_grpc_refuses_what_is_too_long_in_a_stream(front: Front) -> None:
    request = scored(100, 20, logprobs=True, top_logprobs=20, n=16)
    request.stopping.max_tokens = 100_000
    refused = await failure(front.inference.GenerateStream(request))
    assert (refused.code, refused.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
    )
    assert refused.metadata["field"] == "output.top_logprobs"
    assert not front.engine.submitted


# -------------------------------------------------------------------------------- room


class Desk:
    """Answers of senders, each held until its event."""

    def __init__(self, room: AnswerRoom, group: asyncio.TaskGroup | None) -> None:
        self.let_in: list[tuple[str, int]] = []
        self._room = room
        self._start = asyncio.create_task if group is None else group.create_task

    async def ask(self, whose: Sender, size: int) -> tuple[asyncio.Task[None], asyncio.Event]:
        end = asyncio.Event()
        task = self._start(self._hold(whose, size, end))
        await settle()
        return task, end

    async def _hold(self, whose: Sender, size: int, end: asyncio.Event) -> None:
        with self._room.answer(whose) as held:
            await held.fits(AnswerSize(size, size, 1), AnswerForm(SCORES), 1, 1, 1)
            self.let_in.append((next(name for name in reversed(whose) if name), size))
            await end.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


SCORES = ScoreForm(32, 32)


async def test_a_tenant_s_answers_leave_room_for_those_of_others() -> None:
    room = AnswerRoom(100)
    async with asyncio.TaskGroup() as group:
        desk = Desk(room, group)
        _, first = await desk.ask(Sender("a"), 60)
        second, end = await desk.ask(Sender("a"), 60)
        _, other = await desk.ask(Sender("b"), 60)
        assert desk.let_in == [("a", 60), ("b", 60)], "a's second waits, and b is let in"
        leaver, _ = await desk.ask(Sender("a"), 10)
        leaver.cancel()
        await asyncio.wait({leaver})
        other.set()
        await settle()
        assert not second.done()
        assert len(desk.let_in) == 2
        first.set()
        await settle()
        assert desk.let_in[-1] == ("a", 60)
        end.set()
    assert room.held == 0


@pytest.mark.parametrize(
    ("slow", "others"),
    [
        (Sender("default", "host a"), [Sender("default", f"host {n}") for n in range(3)]),
        (Sender("t", "key a"), [Sender("t", "key b"), Sender("t", "gateway", "user b")]),
        (Sender("t", "gateway", "user a"), [Sender("t", "gateway", "user b"), Sender("t")]),
    ],
)
async def test_one_who_does_not_read_keeps_nobody_else_waiting(
    slow: Sender, others: list[Sender]
) -> None:
    """Without keys all callers are one tenant: whatever one host held, all waited for."""
    room = AnswerRoom(100)
    async with asyncio.TaskGroup() as group:
        desk = Desk(room, group)
        ends = [(await desk.ask(slow._replace(connection="c"), 90))[1]]
        ends += [(await desk.ask(slow._replace(connection="d"), 1))[1]]
        assert len(desk.let_in) == 1, "it waits for itself, whatever its connection"
        # What one's answers hold may grow beyond all that there is.
        room.add(slow, 500)
        for each in others:
            ends += [(await desk.ask(each, 10))[1]]
        assert len(desk.let_in) == 1 + len(others)
        room.add(slow, -500)
        for end in ends:
            end.set()
    assert room.held == 0


async def test_a_gateway_s_many_users_do_not_keep_another_key_waiting() -> None:
    room = AnswerRoom(100)
    async with asyncio.TaskGroup() as group:
        desk = Desk(room, group)
        asked = [await desk.ask(Sender("t", "gateway", f"user {n}"), 30) for n in range(8)]
        assert len(desk.let_in) == 4, "together they have a bound as well"
        asked.append(await desk.ask(Sender("t", "key"), 30))
        assert desk.let_in[-1] == ("key", 30)
        assert len(desk.let_in) == 5
        for _, end in asked:
            end.set()
    assert room.held == 0


async def test_who_holds_least_is_next() -> None:
    room = AnswerRoom(100)
    async with asyncio.TaskGroup() as group:
        desk = Desk(room, group)
        asked = [await desk.ask(Sender("t", "many"), 20) for _ in range(6)]
        asked.append(await desk.ask(Sender("t", "few"), 1))
        asked.append(await desk.ask(Sender("t", "few"), 2))
        assert desk.let_in == [("many", 20)] * 3 + [("few", 1)]
        asked[0][1].set()
        await settle()
        assert desk.let_in[4:] == [("few", 2), ("many", 20)]
        for _, end in asked:
            end.set()
    assert room.held == 0


ECHOES = AnswerForm(SCORES, (SCORES,), prompt_field="output.echo", largest=1000)
IDS = AnswerForm(SCORES, (SCORES,), ids=8, prompt_ids=8, largest=1000)


@pytest.mark.parametrize(
    ("form", "asked", "field"),
    [
        (IDS, {"echoed": 900}, "output.echo"),
        (IDS, {"prompt_tokens": 900}, "return_token_ids"),
        (IDS, {"prompt_tokens": 900, "prompt_tops": 1}, "output.prompt_logprobs"),
        (ECHOES, {"prompt_tokens": 900, "prompt_tops": 1}, "output.echo"),
        (IDS, {"tokens": 900}, "return_token_ids"),
        (IDS, {"tokens": 900, "tops": 0}, "output.logprobs"),
        (IDS, {"tokens": 900, "tops": 1}, "output.top_logprobs"),
    ],
)
async def test_what_makes_an_answer_too_large_is_named(
    form: AnswerForm, asked: dict[str, int], field: str
) -> None:
    """It was a field of log-probabilities, also where nobody had asked for any."""
    tokens = asked.pop("tokens", 1)
    given = {"prompt_tokens": 1, "prompt_tops": None, "tops": None, "echoed": 0, **asked}
    size = AnswerSize.of(form, TokenNames([20] * 32, [10] * 32), **given)  # type: ignore[arg-type]
    with AnswerRoom().answer(Sender("a")) as held, refused(InvalidField, field=field) as caught:
        await held.fits(size, form, tokens, tokens, 1)
    assert "repeated prompts" in caught.value.message
    likely = "likely tokens" in caught.value.message
    assert likely == field.endswith("logprobs")


async def test_a_long_wait_for_room_ends_with_a_refusal() -> None:
    room = AnswerRoom(100, patience_s=0.001)
    with room.answer(Sender("a")) as first, room.answer(Sender("a")) as second:
        form, size = AnswerForm(SCORES), AnswerSize(60, 60, 1)
        await first.fits(size, form, 1, 1, 1)
        with refused(QueueFull, cause="unread_answers") as caught:
            await second.fits(size, form, 1, 1, 1)
        assert caught.value.retry_after_s
        assert room.held == 60
    with room.answer(Sender("a")) as third:
        await third.fits(size, form, 1, 1, 1)
    assert room.held == 0


async def test_prompts_without_a_length_share_what_an_answer_may_have() -> None:
    """The first got all of it, and the second was refused: nobody had asked for so much."""
    room = AnswerRoom()
    form, size = AnswerForm(ScoreForm(100, 100), largest=1000), AnswerSize(0, 100, 10)
    with room.answer(Sender("a"), 4) as held:
        asked = [held.fits(size, form, None, 1000, 1) for _ in range(4)]
        given = await asyncio.gather(*asked)
    assert given == [15] * 4
    with room.answer(Sender("a")) as held, pytest.raises(InvalidField):
        await held.fits(size, form, 91, 1000, 1)


async def test_but_not_while_others_of_the_same_caller_are_let_in() -> None:
    room, refusals = AnswerRoom(100, patience_s=0.2), list[Sender]()
    a, b = Sender("a"), Sender("b")

    async def too_long(task: asyncio.Task[None], whose: Sender) -> None:
        await asyncio.wait({task})
        assert isinstance(task.exception(), QueueFull)
        refusals.append(whose)

    desk = Desk(room, None)
    (_, first), (_, held) = await desk.ask(a, 60), await desk.ask(b, 60)
    (second, end), (third, _) = await desk.ask(a, 50), await desk.ask(a, 1)
    waits, _ = await desk.ask(b, 1)  # it came last
    first.set()
    await asyncio.gather(too_long(third, a), too_long(waits, b))
    assert refusals == [b, a]
    end.set()
    held.set()
    await second
    await settle()
    assert room.held == 0


# -------------------------------------------------------------------------------- JSON


def drawn(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(7 if depth else 4)
    if kind == 0:
        return rng.choice((None, True, False, 0.5, -3.25e-9))
    if kind < 3:
        return rng.randrange(10 ** rng.randrange(1, 30))
    if kind == 3:
        return "".join(rng.choices('aé"\\\n🦆', k=rng.randrange(12)))
    count = rng.randrange(6)
    if kind < 6:
        return [drawn(rng, depth - 1) for _ in range(count)]
    return {f"k{at}": drawn(rng, depth - 1) for at in range(count)}


async def test_long_json_is_what_json_is() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def many(value: Any) -> Any:
        """A value with some of its lists long ones."""
        if isinstance(value, dict):
            return {name: many(each) for name, each in value.items()}
        if not isinstance(value, list) or rng.random() < 0.3:
            return value
        items = list(value)
        options: dict[str, Any] = {"at_once": rng.randrange(1, 4), "keep": rng.random() < 0.5}
        cut = rng.randrange(len(items) + 1)
        if rng.random() < 0.5:
            return Many(len(items), lambda: items, **options)
        return Joined(
            Many(cut, lambda: items[:cut], **options),
            Many(len(items) - cut, lambda: items[cut:], **options),
        )

    for _ in range(300):
        value = drawn(rng, 4)
        long = many(value)
        for _ in range(2):  # what was kept is the same
            assert json.loads(b"".join(written(long))) == value
            assert json.loads(dump(long)) == value


async def test_a_value_is_measured_no_further_than_to_its_limit() -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(500):
        value = drawn(rng, 4)
        size = len(json.dumps(value, separators=(",", ":"), ensure_ascii=False))
        # Lists and objects of one entry have no comma, but a bracket.
        assert not longer_as_json(value, size), value
    for long in (
        list(range(500_000)),
        [[0] * 1000] * 500,
        {"enum": [1] * 200_000},
        {f"key {at}": 0 for at in range(100_000)},
        ["x" * 300_000],
        [10**4000] * 300,
    ):
        assert longer_as_json(long, 256 << 10)
        with pytest.raises(InvalidField):
            check_json_size("tools", long, 256 << 10)


LONG = list(range(400_000))


@pytest.mark.parametrize(
    ("path", "given", "param"),
    [
        ("/v1/completions", {**TEXT, "guided_json": {"enum": LONG}}, "guided_json"),
        (
            "/v1/completions",
            {**TEXT, "structured_outputs": {"json": {"enum": LONG}}},
            "structured_outputs.json",
        ),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"enum": LONG}},
                },
            },
            "response_format",
        ),
        (
            "/v1/chat/completions",
            {**CHAT, "chat_template_kwargs": {"a": LONG}},
            "chat_template_kwargs",
        ),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"a": LONG}}}
                ],
            },
            "tools",
        ),
        (
            "/v1/chat/completions",
            {
                **CHAT,
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {
                        "role": "assistant",
                        "tool_calls": [{"function": {"name": "a", "arguments": {"a": LONG}}}],
                    },
                ],
            },
            "messages[1].tool_calls",
        ),
        (
            "/v1/messages",
            {
                "model": BASE,
                "max_tokens": 1,
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {
                        "role": "assistant",
                        "content": [
                            {"type": "tool_use", "id": "a", "name": "b", "input": {"a": LONG}}
                        ],
                    },
                ],
            },
            "messages[1].content[0].input",
        ),
        ("/v1/completions", {**TEXT, "stop_token_ids": LONG}, "stop_token_ids"),
        ("/v1/completions", {**TEXT, "prompt": [*LONG, "a"]}, "prompt"),
        ("/v1/completions", {**TEXT, "prompt": [[1, 2], [*LONG, -1]]}, "prompt"),
        ("/detokenize", {"model": BASE, "tokens": [*LONG, True]}, f"tokens[{len(LONG)}]"),
    ],
)
async def test_what_grows_with_a_request_is_never_written_before_it_is_measured(
    http: httpx.AsyncClient,
    front: Front,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    given: dict[str, Any],
    param: str,
) -> None:
    longest = 0
    dumps, encode = json.dumps, msgspec.json.encode

    def counted(make: Any) -> Any:
        def made(*args: Any, **options: Any) -> Any:
            nonlocal longest
            text = make(*args, **options)
            longest = max(longest, len(text))
            return text

        return made

    body = dumps(given)
    monkeypatch.setattr(json, "dumps", counted(dumps))
    monkeypatch.setattr(msgspec.json, "encode", counted(encode))
    answer = await http.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text[:200]
    shown = answer.json()["error"]
    # Of a list it may name the entry that is wrong.
    assert shown.get("param", param) in (param, f"{param}[400000]"), shown
    assert len(answer.content) < 2000, "it does not repeat what was sent"
    assert longest < 300_000
    assert not front.engine.submitted


async def test_an_error_is_not_written_into_half_an_event() -> None:
    """One of several prompts fails while the scores of another are being sent."""
    sent: list[bytes] = []
    aborted, stuck = asyncio.Event(), asyncio.Event()

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))
        if len(sent) == 3:
            stuck.set()
            await asyncio.Event().wait()

    reply = Reply({"state": {ABORT: aborted.set}}, send, 30.0)
    spare = SpareTime()
    long = {"choices": Many(200_000, lambda: range(200_000))}
    writing = asyncio.create_task(reply.long_events([long], {}, spare, NOBODY))
    await stuck.wait()
    writing.cancel()
    await asyncio.wait({writing})
    before = len(sent)
    await reply.fail(HttpError(500, "internal", "the engine has failed"))
    assert aborted.is_set()
    assert len(sent) == before
    spare.close()


async def test_a_host_with_many_long_answers_has_one_turn_beside_another() -> None:
    """Without keys both are one tenant, in which it was first come, first served."""
    spare, go, order = SpareTime(), threading.Event(), list[str]()

    async def piece(caller: str, work: Callable[[], object]) -> None:
        await spare.run(work, Caller(peer=f"{caller}:1").sender)
        order.append(caller)

    async with asyncio.TaskGroup() as group:
        group.create_task(piece("10.0.0.1", go.wait))
        for _ in range(5):
            group.create_task(piece("10.0.0.1", lambda: None))
        group.create_task(piece("10.0.0.2", lambda: None))
        await settle()
        go.set()
    spare.close()
    assert order.index("10.0.0.2") <= 2


async def test_large_grpc_requests_do_not_pile_up_while_they_are_looked_through(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were read as fast as they came, and waited in memory for the one thread."""
    go, convert_it = threading.Event(), convert.generate_call

    def slowly(*args: Any, **more: Any) -> Any:
        go.wait()
        return convert_it(*args, **more)

    monkeypatch.setattr(convert, "generate_call", slowly)
    size, count = 3 << 20, 12
    request = inference_pb2.GenerateRequest(prompt="Hi")
    request.stopping.stop.append("x" * size)
    calls = {asyncio.ensure_future(front.inference.Generate(request)) for _ in range(count)}
    refused: set[Any] = set()
    while len(refused) < count - MAX_WAITING // 2 // size:
        done, _ = await asyncio.wait(calls - refused, return_when=asyncio.FIRST_COMPLETED)
        refused |= done
    go.set()
    await asyncio.wait(calls)
    for call in calls:
        error = call.exception()
        assert isinstance(error, grpc.aio.AioRpcError)
        full = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert full == (call in refused), error
