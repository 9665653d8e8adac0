"""Every request option on the wire, and its effect on answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from veneer_client import (
    Chat,
    ChatMessage,
    FinishReason,
    GenerateOptions,
    Sample,
    Text,
    TokenLogprob,
    Tool,
    ToolMode,
    TopLogprob,
)
from veneer_client.types import SamplingNumbers
from veneer_proto.v1 import inference_pb2 as pb
from veneer_registry.errors import InvalidField

from tests.refused import refused
from tests.unit.client.drivers import Driver
from tests.unit.client.fake_server import FakeServer


def asked(server: FakeServer, client: Driver, **options: Any) -> pb.GenerateRequest:
    client.generate(Text("x"), **options)
    request: pb.GenerateRequest = server.calls[-1][1]
    return request


def test_every_option_arrives(server: FakeServer, client: Driver) -> None:
    request = asked(
        server,
        client,
        min_p=0.125,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.25,
        logit_bias={7: -100.0, 0: 1.5},
        stop_token_ids=(3, 4),
        top_logprobs=5,
        n=3,
        use_prefix_cache=False,
        priority=-5,
    )
    assert request == pb.GenerateRequest(
        prompt="x",
        sampling=pb.SamplingOptions(
            min_p=0.125,
            repetition_penalty=1.5,
            presence_penalty=-0.5,
            frequency_penalty=0.25,
            logit_bias={7: -100.0, 0: 1.5},
        ),
        stopping=pb.StoppingOptions(stop_token_ids=[3, 4]),
        output=pb.OutputOptions(logprobs=True, top_logprobs=5, n=3),
        use_prefix_cache=False,
        priority=-5,
    )


def test_no_option_is_forgotten(server: FakeServer, client: Driver) -> None:
    """One that is added to the type but not to the request would be dropped."""
    bare = asked(server, client).SerializeToString(deterministic=True)
    values: dict[str, Any] = {
        "adapter": "a",
        "request_id": "r",
        "session_key": "k",
        "stop": ["s"],
        "stop_token_ids": [1],
        "logit_bias": {1: 1.0},
        "json_schema": {},
        "regex": "a",
        "choice": ["a"],
        "grammar": "a",
        "template_kwargs": {"a": 1},
        "reasoning_effort": "low",
        "tools": [Tool("f")],
        "tool_choice": "f",
    }
    for name in GenerateOptions.__optional_keys__ - {"timeout_s"}:
        request = asked(server, client, **{name: values.get(name, 1)})
        assert request.SerializeToString(deterministic=True) != bare, name


def test_no_number_of_the_contract_is_forgotten() -> None:
    contract = {field.name for field in pb.SamplingOptions.DESCRIPTOR.fields}
    assert contract - SamplingNumbers.__optional_keys__ == {"logit_bias"}
    assert contract > SamplingNumbers.__optional_keys__


def test_tools(server: FakeServer, client: Driver) -> None:
    schema = {"type": "object", "properties": {"ä": {"type": "string"}}}
    sent = asked(
        server,
        client,
        tools=[Tool("f", "does it", schema, strict=True), Tool("g")],
        tool_choice=ToolMode.REQUIRED,
        parallel_tool_calls=False,
    )
    assert [(tool.name, tool.description) for tool in sent.tools] == [
        ("f", "does it"),
        ("g", ""),
    ]
    assert json.loads(sent.tools[0].parameters) == schema
    assert [tool.strict for tool in sent.tools] == [True, False]
    assert sent.tools[1].parameters == ""
    assert sent.tool_choice.mode == pb.TOOL_MODE_REQUIRED
    assert sent.HasField("parallel_tool_calls")
    assert not sent.parallel_tool_calls
    assert asked(server, client, tools=[Tool("f")], tool_choice="f").tool_choice.name == "f"


def test_prefix_cache_unset_is_not_off(server: FakeServer, client: Driver) -> None:
    assert not asked(server, client).HasField("use_prefix_cache")
    assert asked(server, client, use_prefix_cache=False).HasField("use_prefix_cache")


def test_constraints(server: FakeServer, client: Driver) -> None:
    schema = {"type": "object", "properties": {"ä": {"type": "string"}}}
    sent = asked(server, client, json_schema=schema).constraint
    assert json.loads(sent.json_schema) == schema
    assert asked(server, client, json_schema={}).constraint.json_schema == "{}"
    assert asked(server, client, regex="a|b").constraint.regex == "a|b"
    assert asked(server, client, grammar="start: /a/").constraint.grammar == "start: /a/"
    assert list(asked(server, client, choice=["a", "b"]).constraint.choice.texts) == ["a", "b"]
    nothing = asked(server, client, choice=[])
    assert nothing.constraint.WhichOneof("kind") == "choice", "the server says what is wrong"
    assert not asked(server, client).HasField("constraint")


def test_what_templates_are_told(server: FakeServer, client: Driver) -> None:
    sent = asked(server, client, template_kwargs={"on": False, "n": [1, "ä"]})
    assert json.loads(sent.template.kwargs) == {"on": False, "n": [1, "ä"]}
    client.chat([{"role": "assistant", "content": "Hi", "reasoning": "hm"}])
    [message] = server.calls[-1][1].messages.messages
    assert (message.content, message.reasoning) == ("Hi", "hm")


def test_two_constraints_are_refused_here(server: FakeServer, client: Driver) -> None:
    with refused(InvalidField, field="constraint", given="regex choice"):
        client.generate(Text("x"), regex="a", choice=["a"])
    assert server.calls == []


@pytest.mark.parametrize(
    "options",
    [{"top_k": -1}, {"seed": 1 << 64}, {"temperature": "hot"}, {"logit_bias": {-1: 0.0}}],
    ids=str,
)
def test_what_a_field_cannot_hold(
    options: dict[str, Any], server: FakeServer, client: Driver
) -> None:
    with refused(InvalidField, field="options"):
        client.generate(Text("x"), **options)
    assert server.calls == []


def test_a_plain_string_is_no_prompt(server: FakeServer, client: Driver) -> None:
    # A wrong use of the client is a plain error, whose sentence is the fix, here and below.
    with pytest.raises(TypeError, match=r"not str: Chat.user\('Hi'\).*Text\('Hi'\)"):
        client.generate("Hello")  # type: ignore[arg-type]
    assert server.calls == []


def test_a_misspelt_option_is_no_silence(server: FakeServer, client: Driver) -> None:
    with pytest.raises(TypeError, match=r"max_token'.*max_tokens"):
        client.generate(Text("x"), max_token=4)
    assert server.calls == []


def test_samples_and_top_logprobs_of_an_answer(server: FakeServer, client: Driver) -> None:
    def answer(request: pb.GenerateRequest) -> pb.GenerateResponse:
        top = [
            pb.TopLogprob(token_id=7, logprob=-0.5, token=" a"),
            pb.TopLogprob(token_id=9, logprob=-2, token="bytes:\\xf0"),
        ]
        return pb.GenerateResponse(
            text="a",
            reasoning="hm",
            token_ids=[7],
            logprobs=[pb.TokenLogprob(token_id=7, logprob=-0.5, token=" a", top=top)],
            prompt_logprobs=[pb.TokenLogprob(token_id=3, logprob=-9, token=" b", rank=4321)],
            finish_reason=pb.FINISH_REASON_STOP,
            usage=pb.Usage(
                prompt_tokens=9, completion_tokens=3, cached_prompt_tokens=8, reasoning_tokens=2
            ),
            others=[
                pb.Sample(text="b", token_ids=[8, 8], finish_reason=pb.FINISH_REASON_LENGTH)
            ],
        )

    server.on_generate = answer
    got = client.generate(Text("x"), n=2, top_logprobs=2)
    top = (TopLogprob(7, -0.5, " a"), TopLogprob(9, -2.0, "bytes:\\xf0"))
    assert got.logprobs == (TokenLogprob(7, -0.5, top, " a"),)
    assert got.others == (Sample("b", (8, 8), (), FinishReason.LENGTH),)
    assert got.reasoning == "hm"
    assert got.prompt_logprobs == (TokenLogprob(3, -9.0, (), " b", rank=4321),)
    assert (got.usage.cached_prompt_tokens, got.usage.reasoning_tokens) == (8, 2)


def test_samples_of_a_stream(server: FakeServer, client: Driver) -> None:
    """Each sample's end is told, also one that brings no text and is not the last."""
    piece = pb.GenerateStreamResponse
    server.pieces = [
        piece(text="a", token_ids=[1], index=0),
        piece(text="b", token_ids=[2], index=1, finish_reason=pb.FINISH_REASON_STOP),
        piece(
            index=0,
            finish_reason=pb.FINISH_REASON_LENGTH,
            final=pb.GenerateStreamFinal(finish_reason=pb.FINISH_REASON_LENGTH),
        ),
    ]
    chunks, end = client.stream(Text("x"), n=2)
    assert [(c.index, c.text, c.finish_reason) for c in chunks] == [
        (0, "a", None),
        (1, "b", FinishReason.STOP),
        (0, "", FinishReason.LENGTH),
    ]
    assert end.finish_reason is FinishReason.LENGTH


def test_chat_takes_turns_as_records_or_mappings(server: FakeServer, client: Driver) -> None:
    turns = [ChatMessage("system", "s"), {"role": "user", "content": "u"}]
    client.chat(turns, adapter="chat", max_tokens=3)
    request = server.calls[-1][1]
    assert [(m.role, m.content) for m in request.messages.messages] == [
        ("system", "s"),
        ("user", "u"),
    ]
    assert (request.adapter, request.stopping.max_tokens) == ("chat", 3)


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"role": "user"},
        {"role": "user", "content": "x", "name": "y"},
        {"role": 1, "content": 2},
    ],
    ids=str,
)
def test_a_mapping_that_is_no_turn(message: Any) -> None:
    with refused(InvalidField, field="messages"):
        Chat.of([message])
