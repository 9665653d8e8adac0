"""vLLM's options over HTTP, and their fields over gRPC."""

from __future__ import annotations

import httpx
import pytest
from veneer_proto.v1 import inference_pb2 as pb
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceOutput

from tests.unit.server.openai.kit import CHAT, TEXT, error_of, events, ok, post
from tests.unit.server.rpc.fake_engine import CONTEXT
from tests.unit.server.rpc.front_harness import Front, failure, prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_an_echo_without_an_answer(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    """How evaluation harnesses score a text."""
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    body = await ok(http, TEXT, max_tokens=0, echo=True, logprobs=1)
    [choice] = body["choices"]
    assert choice["text"] == "Hello there"
    assert len(choice["logprobs"]["tokens"]) == len(ids)
    assert choice["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
    [*_, last] = chunks = await events(http, TEXT, max_tokens=0, echo=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hello there"
    assert last["choices"][0]["finish_reason"] == "length"
    answer = await front.inference.Generate(
        prompt(
            stopping=pb.StoppingOptions(max_tokens=0),
            output=pb.OutputOptions(echo=True, logprobs=True),
        )
    )
    assert (answer.text, list(answer.token_ids)) == ("Hello there", [])
    assert len(answer.prompt_logprobs) == len(ids) - 1


async def test_log_probabilities_of_the_prompt(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    body = await ok(http, TEXT, prompt_logprobs=2)
    [choice] = body["choices"]
    assert choice["logprobs"] is None
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    assert len(rest) == len(ids) - 1
    token = ids[1]  # the fake says that it is the likeliest, and the next id the second
    assert rest[0] == {
        str(token): {
            "logprob": -1.0,
            "rank": 1,
            "decoded_token": tokenizer.token_label(token),
        },
        str(token + 1): {
            "logprob": -1.5,
            "rank": 2,
            "decoded_token": tokenizer.token_label(token + 1),
        },
    }
    chat = await ok(http, CHAT, prompt_logprobs=0, logprobs=True, top_logprobs=3)
    assert {len(each) for each in chat["prompt_logprobs"][1:]} == {1}
    # Where the likeliest were not asked for, the rank is what the engine counted: 7, 8 ...
    places = [entry["rank"] for each in chat["prompt_logprobs"][1:] for entry in each.values()]
    assert places == [7 + at for at in range(len(places))]
    scores = chat["choices"][0]["logprobs"]["content"]
    assert {len(score["top_logprobs"]) for score in scores} == {3}
    echoed = await ok(http, TEXT, prompt_logprobs=0, echo=True)
    assert echoed["choices"][0]["logprobs"] is None
    answer = await front.inference.Generate(prompt(output=pb.OutputOptions(prompt_logprobs=2)))
    assert [len(each.top) for each in answer.prompt_logprobs] == [2] * (len(ids) - 1)
    assert [each.rank for each in answer.prompt_logprobs] == [7 + at for at in range(len(rest))]
    assert not answer.logprobs
    echo = prompt(output=pb.OutputOptions(echo=True, logprobs=True))
    echoed_entries = (await front.inference.Generate(echo)).prompt_logprobs
    assert {each.rank for each in echoed_entries} == {0}
    assert not front.engine.submitted[-1].prompt_ranks, "counting costs something"


async def test_token_ids_beside_the_text(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("Hello there", add_special_tokens=True)
    emoji = tokenizer.encode("😀", add_special_tokens=False)
    assert len(emoji) > 1
    front.engine.script = [
        SequenceOutput(1, [token], finish=None if token != emoji[-1] else "stop")
        for token in emoji
    ]
    body = await ok(http, TEXT, return_token_ids=True)
    [choice] = body["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (ids, emoji)
    chunks = await events(http, TEXT, return_token_ids=True)
    found = [chunk["choices"][0] for chunk in chunks]
    assert [token for each in found for token in each["token_ids"]] == emoji
    assert found[0]["prompt_token_ids"] == ids
    assert not any("prompt_token_ids" in each for each in found[1:])
    plain = await ok(http, TEXT)
    assert not {"token_ids", "prompt_token_ids"} & set(plain["choices"][0])


async def test_tokens_called_by_their_ids(http: httpx.AsyncClient) -> None:
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    chat = await ok(http, CHAT, logprobs=True, top_logprobs=1, **ids)
    [choice] = chat["choices"]
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    assert [entry["token"] for entry in choice["logprobs"]["content"]] == names
    assert [e["top_logprobs"][0]["token"] for e in choice["logprobs"]["content"]] == names
    text = await ok(http, TEXT, logprobs=1, **ids)
    [choice] = text["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{t}" for t in choice["token_ids"]]


async def test_a_prompt_is_cut_from_the_left(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    long = " ".join(map(str, range(3000)))
    ids = tokenizer.encode(long, add_special_tokens=True)
    assert len(ids) > 100 * CONTEXT
    given = {**TEXT, "prompt": long, "max_tokens": 4}
    for kept, asked in ((5, 5), (CONTEXT - 4, -1)):
        body = await ok(http, given, truncate_prompt_tokens=asked, return_token_ids=True)
        assert body["choices"][0]["prompt_token_ids"] == ids[-kept:]
        assert body["usage"]["prompt_tokens"] == kept
    body = await ok(http, {**given, "prompt": ids}, truncate_prompt_tokens=3, echo=True)
    assert body["choices"][0]["text"].startswith(tokenizer.decode(ids[-3:]))
    chat = {**CHAT, "messages": [{"role": "user", "content": long}], "max_tokens": None}
    await ok(http, chat, truncate_prompt_tokens=-1)
    assert len(front.engine.submitted[-1].prompt) == CONTEXT - 1
    await ok(http, chat, truncate_prompt_tokens=7)
    assert len(front.engine.submitted[-1].prompt) == 7
    words = " hello" * 12_000  # so many bytes are looked at before they are parsed
    await front.inference.Generate(prompt(words, truncate_prompt_tokens=5))
    assert front.engine.submitted[-1].prompt == tokenizer.encode(
        " hello" * 5, add_special_tokens=True
    )
    short = await ok(http, TEXT, truncate_prompt_tokens=50)
    assert short["usage"]["prompt_tokens"] == 2
    error = error_of(await post(http, TEXT, truncate_prompt_tokens=CONTEXT))
    assert error["param"] == "truncate_prompt_tokens"
    error = error_of(await post(http, given))
    assert error["code"] == "context_length_exceeded", "unless it is to be cut"


@pytest.mark.parametrize("most", [CONTEXT, 32_000])
async def test_no_prompt_is_cut_to_nothing_for_its_answer(
    front: Front, http: httpx.AsyncClient, most: int
) -> None:
    """A chat's limit may be more than the context, but then -1 leaves no prompt."""
    for given in (CHAT, TEXT):
        answer = await post(http, {**given, "max_tokens": most}, truncate_prompt_tokens=-1)
        assert answer.status_code == 400
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
        assert f"set max_tokens to at most {CONTEXT - 1}" in error["message"]
    assert not front.engine.submitted
    await ok(http, {**CHAT, "max_tokens": most}, truncate_prompt_tokens=7)
    assert len(front.engine.submitted[-1].prompt) == 7


async def test_the_least_number_of_tokens(
    front: Front, http: httpx.AsyncClient, tokenizer: TextTokenizer
) -> None:
    ids = tokenizer.encode("a b a b a b", add_special_tokens=False)
    front.engine.script = [
        SequenceOutput(1, [token], finish="length" if at + 1 == len(ids) else None)
        for at, token in enumerate(ids)
    ]
    body = await ok(http, TEXT, stop=[" b"], min_tokens=3, max_tokens=9)
    assert body["choices"][0]["text"] == "a b a"
    assert front.engine.submitted[-1].min_tokens == 3
    stopping = pb.StoppingOptions(stop=[" b"], min_tokens=3, max_tokens=9)
    assert (await front.inference.Generate(prompt(stopping=stopping))).text == "a b a"
    refused = await failure(
        front.inference.Generate(
            prompt(stopping=pb.StoppingOptions(min_tokens=5, max_tokens=4))
        )
    )
    assert refused.metadata["field"] == "stopping.min_tokens"
    error = error_of(await post(http, TEXT, min_tokens=10_000, max_tokens=None))
    assert error["param"] == "min_tokens"


async def test_grammars_and_what_the_gateway_calls_fields(
    front: Front, http: httpx.AsyncClient
) -> None:
    await ok(http, CHAT, structured_outputs={"grammar": "start: /a+/"})
    await front.inference.Generate(prompt(constraint=pb.Constraint(grammar="start: /a+/")))
    one, other = front.engine.submitted
    assert one.constraint == other.constraint
    assert one.constraint is not None
    assert one.constraint.kind == "grammar"
    for given, param in (
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"regex": "a", "b": 2}}, "structured_outputs.b"),
    ):
        assert error_of(await post(http, CHAT, **given))["param"] == param
    await ok(http, CHAT, continue_final_message=True, return_token_ids=True)


async def test_a_salt_keeps_prefixes_apart(front: Front, http: httpx.AsyncClient) -> None:
    scopes = []
    for salt in ({}, {"cache_salt": "a"}, {"cache_salt": "b"}, {"cache_salt": "a"}):
        await ok(http, CHAT, **salt)
        scopes.append(front.engine.submitted[-1].cache_scope)
    assert scopes[1] == scopes[3]
    assert len(set(scopes)) == 3
    assert all(scope.startswith(scopes[0]) for scope in scopes), "within the tenant's"
    message = {**CHAT, "cache_salt": "a"}
    assert (await http.post("/v1/messages", json=message)).status_code == 200
    assert front.engine.submitted[-1].cache_scope == scopes[1]
