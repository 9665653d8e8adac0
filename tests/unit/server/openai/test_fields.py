"""From JSON to the call: which fields are served, refused or ignored."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError
from veneer_registry.errors import InvalidField
from veneer_server.openai.fields import (
    IGNORED,
    MAX_MESSAGES,
    MAX_PROMPTS,
    REFUSED,
    ChatFields,
    CompletionFields,
    parse_fields,
)
from veneer_server.openai.requests import chat_call, completion_calls
from veneer_server.serving.records import (
    ChatMessages,
    GenerateCall,
    PromptText,
    PromptTokens,
    Sampling,
)
from veneer_server.text.turns import TemplateOptions
from veneer_server.wire.messages import Constraint

from tests.refused import refused

BASE = "org/base"


def chat(**given: Any) -> GenerateCall:
    given = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], **given}
    return chat_call(parse_fields(ChatFields, given), BASE)


def completions(**given: Any) -> list[GenerateCall]:
    given = {"model": BASE, "prompt": "Hi", **given}
    return completion_calls(parse_fields(CompletionFields, given), BASE)


def refusal(**given: Any) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        chat(**given)
    return caught.value


def test_every_field_that_is_served_arrives() -> None:
    call = chat(
        model="sql@0123456789ab",
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]},
        ],
        temperature=0,
        top_p=0.5,
        top_k=7,
        min_p=0.25,
        seed=2**64 - 1,
        repetition_penalty=1.5,
        presence_penalty=1,
        frequency_penalty=-1,
        logit_bias={"17": -100, "5": 2.5},
        max_completion_tokens=9,
        stop=["x", "y"],
        stop_token_ids=[2, 3],
        ignore_eos=True,
        logprobs=True,
        top_logprobs=4,
        n=3,
        use_prefix_cache=False,
        priority=-2,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": {}}},
    )
    assert call == GenerateCall(
        adapter="sql@0123456789ab",
        input=ChatMessages(
            (
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "ab"},
            )
        ),
        sampling=Sampling(
            {
                "temperature": 0,
                "top_p": 0.5,
                "top_k": 7,
                "min_p": 0.25,
                "seed": 2**64 - 1,
                "repetition_penalty": 1.5,
                "presence_penalty": 1,
                "frequency_penalty": -1,
                "logit_bias": {17: -100, 5: 2.5},
            }
        ),
        max_tokens=9,
        stops=("x", "y"),
        stop_token_ids=(2, 3),
        ignore_eos=True,
        logprobs=True,
        echo=False,
        top_logprobs=4,
        n=3,
        use_prefix_cache=False,
        priority=-2,
        constraint=Constraint("json_schema", "{}"),
        open_ended=True,
        clamped=True,
    )


def test_what_is_left_out_or_null_stays_unset() -> None:
    plain = chat()
    nulls = dict.fromkeys(ChatFields.model_fields.keys() - {"model", "messages"})
    assert chat(**nulls) == plain
    assert plain == GenerateCall(
        adapter="",
        input=ChatMessages(({"role": "user", "content": "Hi"},)),
        sampling=Sampling(),
        max_tokens=None,
        stops=(),
        ignore_eos=False,
        logprobs=False,
        echo=False,
        open_ended=True,
        clamped=True,
    )
    assert chat(top_k=-1).sampling.given["top_k"] == 0


def test_an_assistant_message_as_the_sdk_writes_it_back() -> None:
    nulls = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls"))
    message = {"role": "assistant", "content": "Hi", **nulls}
    assert chat(messages=[message]) == chat(messages=[{"role": "assistant", "content": "Hi"}])


@pytest.mark.parametrize(
    "member",
    [
        {"tool_calls": []},
        {"annotations": []},
        {"function_call": {}},
        {"refusal": ""},
        {"reasoning_content": ""},
        {"nobody_knows": None},
    ],
)
def test_what_is_empty_changes_nothing(member: dict[str, Any]) -> None:
    plain = {"role": "assistant", "content": "Hi"}
    assert chat(messages=[{**plain, **member}]) == chat(messages=[plain])


def test_values_of_request_fields_that_change_nothing() -> None:
    neutral = {
        "tools": [],
        "functions": [],
        "tool_choice": "none",
        "audio": None,
        "allowed_token_ids": [],
        "chat_template_kwargs": {},
        "documents": [],
        "mm_processor_kwargs": {},
        "nobody_knows": [],
    }
    assert chat(**neutral) == chat()
    with refused(InvalidField, field="web_search_options"):
        chat(web_search_options={})  # this one asks for something
    # Fields of the other endpoint, which say nothing there.
    assert completions(include_reasoning=True, chat_template_kwargs={}) == completions()
    assert chat(echo=False, best_of=None) == chat()
    with refused(InvalidField, field="echo"):
        chat(echo=True)
    with refused(InvalidField, field="reasoning_effort"):
        completions(reasoning_effort="low")


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"messages": [{"role": "user", "content": "Hi", "a": 1, "b": 2, "c": 3}]}, "a"),
        ({"messages": [{"role": "user", "content": "Hi", "x-y": [0]}]}, "x-y"),
        ({"messages": [{"role": "user", "content": "Hi", "audio": {"id": "1"}}]}, "audio"),
    ],
)
def test_an_unknown_member_of_a_message_is_named(given: dict[str, Any], field: str) -> None:
    error = refusal(**given)
    assert error.metadata["field"] == f"messages[0].{field}"
    assert field in error.message


def test_vllms_extensions_arrive() -> None:
    call = chat(
        messages=[
            {"role": "user", "content": "1+1"},
            {
                "role": "assistant",
                "content": "2",
                "reasoning": "easy",
                "reasoning_content": "x",
            },
        ],
        min_tokens=3,
        prompt_logprobs=2,
        truncate_prompt_tokens=-1,
        chat_template_kwargs={"enable_thinking": False, "deep": [1, {"a": None}]},
        reasoning_effort="low",
        include_reasoning=False,
        continue_final_message=True,
        structured_outputs={"grammar": "start: /a+/"},
    )
    assert call.constraint == Constraint("grammar", "start: /a+/")
    assert call.constraint == chat(guided_grammar="start: /a+/").constraint
    assert (call.min_tokens, call.prompt_logprobs, call.truncate_prompt) == (3, 2, -1)
    assert not call.include_reasoning
    assert call.input == ChatMessages(
        (
            {"role": "user", "content": "1+1"},
            {
                "role": "assistant",
                "content": "2",
                "reasoning": "easy",
                "reasoning_content": "easy",
            },
        ),
        TemplateOptions(
            {"enable_thinking": False, "deep": [1, {"a": None}], "reasoning_effort": "low"},
            add_generation_prompt=False,
            continue_final=True,
        ),
    )
    assert chat(reasoning_effort="none").input == ChatMessages(
        ({"role": "user", "content": "Hi"},),
        TemplateOptions({"enable_thinking": False, "reasoning_effort": "none"}),
    )


def test_an_echo_without_an_answer() -> None:
    [call] = completions(max_tokens=0, echo=True)
    assert (call.max_tokens, call.echo) == (0, True)
    with refused(InvalidField, field="stopping.max_tokens"):
        completions(max_tokens=0)
    with refused(InvalidField, field="stopping.max_tokens"):
        chat(max_tokens=0)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
def test_prompts_of_every_form(prompt: Any, expected: list[Any]) -> None:
    calls = completions(prompt=prompt, echo=True, logprobs=0, max_tokens=4)
    assert [call.input for call in calls] == [
        PromptText(one) if isinstance(one, str) else PromptTokens(one) for one in expected
    ]
    for call in calls:
        assert (call.echo, call.logprobs, call.top_logprobs) == (True, True, 0)
        assert call.max_tokens == 4


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", 1], [1, [2]], 7, [-1], [2**32], ["a"] * (MAX_PROMPTS + 1)]
)
def test_prompts_that_are_none(prompt: Any) -> None:
    with pytest.raises(InvalidField) as caught:
        completions(prompt=prompt)
    # The core, which refuses no tokens, has its own name for them; see `openai.errors`.
    known = "token_ids" if prompt == [[]] else "prompt"
    assert caught.value.metadata["field"].startswith(known)


SCHEMA = {"type": "object", "properties": {"a": {"const": None}}, "default": None}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        (
            {"response_format": {"type": "json_object"}},
            Constraint("json_schema", '{"type": "object"}'),
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        ({"guided_json": SCHEMA}, Constraint("json_schema", json.dumps(SCHEMA))),
        ({"guided_json": "{}"}, Constraint("json_schema", "{}")),
        ({"guided_regex": "a+"}, Constraint("regex", "a+")),
        ({"guided_choice": ["a"]}, Constraint("choice", json.dumps(["a"]))),
        (
            {"structured_outputs": {"json": SCHEMA, "regex": None}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        ({"structured_outputs": {"regex": "b"}}, Constraint("regex", "b")),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            Constraint("choice", json.dumps(["a", "b"])),
        ),
        (
            {"structured_outputs": {"json_object": True}},
            Constraint("json_schema", '{"type": "object"}'),
        ),
        # Hugging Face's TGI, llama.cpp, SGLang.
        (
            {"response_format": {"type": "json", "value": SCHEMA}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        (
            {"response_format": {"type": "json_object", "value": SCHEMA}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "value": {"name": "s", "schema": SCHEMA},
                }
            },
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
        (
            {"response_format": {"type": "json"}},
            Constraint("json_schema", '{"type": "object"}'),
        ),
        (
            {"response_format": {"type": "regex", "value": "a+"}},
            Constraint("regex", "a+"),
        ),
        ({"regex": "a+"}, Constraint("regex", "a+")),
        ({"json_schema": '{"type": "array"}'}, Constraint("json_schema", '{"type": "array"}')),
        ({"json_schema": SCHEMA}, Constraint("json_schema", json.dumps(SCHEMA))),
        # guidance sends the same grammar under two names.
        (
            {
                "guided_grammar": "start: /a/",
                "guided_decoding_backend": "guidance",
                "structured_outputs": {"grammar": "start: /a/"},
            },
            Constraint("grammar", "start: /a/"),
        ),
        (
            {
                "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
                "guided_json": SCHEMA,
            },
            Constraint("json_schema", json.dumps(SCHEMA)),
        ),
    ],
)
def test_constraints(given: dict[str, Any], expected: Constraint | None) -> None:
    assert chat(**given).constraint == expected


@pytest.mark.parametrize(
    ("given", "field", "says"),
    [
        ({"model": None}, "model", "is missing"),
        ({"messages": []}, "messages", "at least one"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is missing"),
        ({"messages": "Hi"}, "messages", "list"),
        (
            {"messages": [{"role": "user", "content": ""}] * (MAX_MESSAGES + 1)},
            "messages",
            f"at most {MAX_MESSAGES}",
        ),
        ({"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias", "at most 1024"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
            "part 0 is of type 'image_url': only text is supported",
        ),
        ({"messages": [{"role": "tool", "content": "1", "tool": "x"}]}, None, "tool"),
        ({"temperature": "0.5"}, "temperature", "number"),
        ({"temperature": float("inf")}, "temperature", "finite"),
        ({"max_tokens": -1}, "max_tokens", "greater"),
        ({"max_tokens": 1.5}, "max_tokens", "integer"),
        ({"n": 0}, "n", "greater"),
        ({"seed": -(2**63) - 1}, "seed", "greater"),
        ({"seed": 1, "random_seed": 2}, "random_seed", "differs from seed"),
        ({"use_prefix_cache": True, "cache_prompt": False}, "cache_prompt", "differs"),
        ({"cache_salt": "x" * 1025}, "cache_salt", "at most 1024"),
        ({"verbosity": "loud"}, "verbosity", "medium"),
        (
            {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}},
            "enable_thinking",
            "differs from chat_template_kwargs",
        ),
        (
            {"verbosity": "low", "chat_template_kwargs": {"verbosity": "high"}},
            "verbosity",
            "differs from chat_template_kwargs",
        ),
        ({"add_special_tokens": True}, "add_special_tokens", "False"),
        ({"response_format": {"type": "regex"}}, "response_format.value", "not a string"),
        (
            {"response_format": {"type": "json_schema", "strict": True}},
            "response_format.strict",
            "not supported",
        ),
        (
            {"structured_outputs": {"structural_tag": "{}"}},
            "structured_outputs.structural_tag",
            "not supported",
        ),
        ({"regex": "a", "guided_regex": "b"}, "regex", "conflicts with guided_regex"),
        ({"min_tokens": -1}, "min_tokens", "greater"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens", "at most stopping.max_tokens, 4"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "less"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "1 or more"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "low"),
        ({"chat_template_kwargs": {"a": "x" * 20_000}}, "template.kwargs", "less"),
        ({"chat_template_kwargs": {"messages": []}}, "template.kwargs", "messages"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "template.continue_final_message",
            "one of them",
        ),
        ({"guided_grammar": "start: /a/", "guided_regex": "a"}, "guided_grammar", "conflicts"),
        ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "empty"),
        ({"seed": 2**64}, "seed", "less"),
        ({"stream": "yes"}, "stream", "boolean"),
        ({"stop": [1]}, "stop", "string"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "not a valid token id"),
        ({"logit_bias": {"4294967296": 1}}, "logit_bias", "not a valid token id"),
        ({"logit_bias": {"0" * 10 + "1234567890123": 1}}, "logit_bias", "not a valid token id"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "missing",
        ),
        *(
            (
                {"response_format": {"type": kind, "json_schema": {"schema": {}}}},
                "response_format.json_schema",
                "'json_schema'",
            )
            for kind in ("text", "json_object")
        ),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "max_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "needs include_usage",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "conflicts"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"xyzzy": 1}, "xyzzy", "leave it out"),
    ],
)
def test_what_is_wrong_names_the_field_and_the_fix(
    given: dict[str, Any], field: str | None, says: str
) -> None:
    error = refusal(**given)
    assert says in error.message
    if field is not None:
        # The core has its own names for some; see `openai.errors`.
        assert error.metadata["field"] in (field, f"stopping.{field}")
        assert field in error.message


MANY = 1000
ONES = dict.fromkeys(map(str, range(MANY)), 1)


@pytest.mark.parametrize(
    "given",
    [
        {"messages": [{}] * MANY},
        {
            "messages": [
                {"role": "user", "content": "Hi", **dict.fromkeys(map(str, range(MANY)), 1)}
            ]
        },
        {"messages": [{"role": "user", "content": [{"type": "image_url"}] * MANY}]},
        {"stop": [{}] * MANY},
        {"stop_token_ids": ["x"] * MANY},
        {"logit_bias": dict.fromkeys(ONES, "x")},
        {"logit_bias": dict.fromkeys(ONES, 10**400)},
        {"guided_choice": [{}] * MANY},
        {"structured_outputs": {"choice": [{}] * MANY}},
        {"stream_options": ONES},
        {"response_format": ONES},
        {"messages": [{"role": "user", "content": "Hi", "x" * MANY: 1}]},
        {"messages": [{"role": "user", "content": [{"type": "x" * MANY}]}]},
        {"logit_bias": {"x" * MANY: "x"}},
        {"response_format": {"type": "x" * MANY}},
        {"prompt": [{}] * MAX_PROMPTS},
        {"prompt": [{}] * MANY},
        {"prompt": ["a", *[{}] * 99]},
        {"prompt": [1, *[{}] * MANY]},
        {"prompt": [[1], *[[{}] * MANY] * 99]},
        {"x" * MANY: 1},
    ],
)
def test_a_bad_body_costs_few_errors_and_a_short_answer(given: dict[str, Any]) -> None:
    """Gathering all of them held up every stream for seconds."""
    kind = CompletionFields if "prompt" in given else ChatFields
    needed = {"model": BASE} | ({} if "prompt" in given else {"messages": []})
    with pytest.raises(InvalidField) as caught:
        parse_fields(kind, {**needed, **given})
    cause = caught.value.__cause__
    assert cause is None or isinstance(cause, ValidationError)
    assert cause is None or cause.error_count() <= 8
    assert len(caught.value.message) < 300
    assert len(caught.value.metadata["field"]) <= 100


def test_a_name_too_long_to_be_a_slip_is_compared_with_no_field(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Comparing takes half a second for a name of some megabytes."""

    def compare(*args: Any, **kwargs: Any) -> list[str]:
        raise AssertionError("compared")

    monkeypatch.setattr("difflib.get_close_matches", compare)
    assert "leave it out" in refusal(**{"temprature" * 1000: 1}).message


def test_the_body_must_be_an_object() -> None:
    bodies: tuple[object, ...] = ([], "x", None, 3)
    for body in bodies:
        with refused(InvalidField, cause="not_object"):
            parse_fields(ChatFields, body)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_fields_that_would_change_the_answer(name: str) -> None:
    neutral, instead = REFUSED[name]
    for value in neutral:
        assert chat(**{name: value}) == chat()
    error = refusal(**{name: ["something"]})
    assert error.metadata["field"] == name
    assert error.message == f"{name} is not supported: {instead}"


def test_the_answer_that_a_caller_expects_is_text_or_parts_of_text() -> None:
    parts = [{"type": "text", "text": text} for text in ("a = 1\n", "b = 2")]
    for content in ("a = 1\nb = 2", parts):
        sent = {"type": "content", "content": content}
        assert chat(prediction=sent) == replace(chat(), prediction="a = 1\nb = 2")
        assert completions(prediction=sent)[0].prediction == "a = 1\nb = 2"
    assert chat(prediction=None) == chat(prediction={"content": ""}) == chat()
    for content in ([{"type": "image_url"}], [{"type": "text"}], [{"type": "text", "text": 1}]):
        error = refusal(prediction={"type": "content", "content": content})
        assert error.metadata["field"] == "prediction.content"
    assert refusal(prediction={"type": "other", "content": "a"}).metadata["field"]


def test_fields_that_change_nothing() -> None:
    assert chat(**{name: ["anything"] for name in IGNORED}) == chat()
    assert not IGNORED & REFUSED.keys()
    for kind in (ChatFields, CompletionFields):
        assert not kind.model_fields.keys() & (IGNORED | REFUSED.keys())


def test_what_is_said_twice_or_asks_for_nothing_is_no_contradiction() -> None:
    assert chat(max_tokens=3, max_completion_tokens=3) == chat(max_tokens=3)
    assert chat(stream_options={}) == chat(stream_options={"include_usage": False}) == chat()
    options = {"include_usage": True, "continuous_usage_stats": True}
    assert chat(stream=True, stream_options=options) == chat()


def test_best_of_only_as_n() -> None:
    assert completions(n=2, best_of=2) == completions(n=2)
    with refused(InvalidField, field="best_of"):
        completions(best_of=2)


def test_a_negative_seed_is_that_of_the_same_64_bits() -> None:
    for given, used in ((-1, 2**64 - 1), (-(2**63), 2**63), (7, 7)):
        assert chat(seed=given).sampling.given["seed"] == used
        assert chat(random_seed=given) == chat(seed=given)


def test_other_names_of_the_same() -> None:
    assert chat(cache_prompt=False) == chat(use_prefix_cache=False)
    assert chat(cache_prompt=True, use_prefix_cache=True) == chat(use_prefix_cache=True)
    assert chat(enable_thinking=False) == chat(chat_template_kwargs={"enable_thinking": False})
    kwargs = {"verbosity": "low"}
    assert chat(verbosity="low") == chat(chat_template_kwargs=kwargs)
    assert chat(verbosity="low", chat_template_kwargs=kwargs) == chat(verbosity="low")
    tool = {"type": "function", "function": {"name": "f"}}
    forced = chat(tools=[tool], tool_choice="required")
    assert chat(tools=[tool], tool_choice="any") == forced
    named = {"function": {"name": "f"}}  # as Hugging Face's client writes it
    assert (
        chat(tools=[tool], tool_choice=named).tools
        == chat(tools=[tool], tool_choice={"type": "function", **named}).tools
    )


def test_a_prefix_is_continued() -> None:
    begun = {"role": "assistant", "content": "The answer is"}
    expected = chat(messages=[begun], continue_final_message=True)
    assert chat(messages=[{**begun, "prefix": True}]) == expected
    assert chat(messages=[{**begun, "prefix": False}]) == chat(messages=[begun])


def test_only_chats_may_use_all_of_the_context() -> None:
    assert (chat().max_tokens, chat().open_ended) == (None, True)
    [call] = completions()
    assert (call.max_tokens, call.open_ended) == (16, False)


def test_a_user_gets_the_same_target_of_a_canary() -> None:
    one, other = chat(user="anna"), chat(user="b" * 5000)
    assert one == chat(user="anna")
    assert one.session_key != other.session_key
    assert chat(user="").session_key == chat().session_key == ""
