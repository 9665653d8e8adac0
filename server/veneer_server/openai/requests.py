"""Builds the parts of a `GenerateCall` from plain values, and calls of chats and completions.

Each HTTP API makes its own call from these parts, so that errors name fields that its caller
can send.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

from veneer_server.openai.extensions import Ignored, Verbosity
from veneer_server.openai.fields import (
    ChatFields,
    CommonFields,
    CompletionFields,
    MessageItem,
    ResponseFormat,
    StreamOptions,
    StructuredOutputs,
)
from veneer_server.openai.tools import template_messages, tools_of
from veneer_server.serving.answer_room import AnswerForm, ScoreForm
from veneer_server.serving.checks import MAX_SCHEMA, check_json_size, choice, invalid
from veneer_server.serving.records import (
    ChatMessages,
    GenerateCall,
    PromptText,
    PromptTokens,
    Sampling,
)
from veneer_server.serving.tool_use import ToolUse
from veneer_server.text.turns import TemplateOptions
from veneer_server.wire.messages import Constraint, SamplingParams

_LATEST: Final = ":latest"
"""Suffix that Ollama's clients append to a name. No adapter's name has a colon."""

_COMPLETION_TOKENS: Final = 16
"""max_tokens of a completion that sets none, as in OpenAI and vLLM. Clients of this older
endpoint rely on it: one that has to wait for hundreds of tokens times out and retries."""

ANY_OBJECT: Final = Constraint("json_schema", '{"type": "object"}')
_NAMED: Final = {"name", "schema"}

CHAT_SCORES: Final = ScoreForm(own=92, top=68, listed=4)
"""``{"token":"a","logprob":-1.5,"bytes":[97],"top_logprobs":[]}``."""

PROMPT_SCORES: Final = ScoreForm(own=94, top=90)
"""``"17":{"logprob":-1.5,"rank":1,"decoded_token":"a"}``."""

_ECHO: Final = ScoreForm(own=72, top=32, named=2)
"""``"a",-1.5,{"a":-1.5,"b":-2.5},17``: numbers have 24 characters at most."""

_ID: Final = 8

# -------------------- parts
# Parts that every API needs, made from plain values, whatever the API calls their fields.


def adapter_named(model: str, base: str) -> str:
    """The adapter that a request names as its model; empty for the base."""
    if model != base:
        model = model.removesuffix(_LATEST) or model
    return "" if model == base else model


def session_key(user: str | None) -> str:
    """Keeps a user on the same target of a canary. Hashed, as the name may have any length."""
    return hashlib.sha256(user.encode()).hexdigest() if user else ""


def sampling_of(given: Mapping[str, Any]) -> Sampling:
    """The sampling options that are set, under their names in `SamplingParams`.

    Args:
        given: fields of a request. All but sampling options are ignored; None means
            unset. A ``top_k`` of -1 is off, as in vLLM. A negative seed means the unsigned
            number with the same 64 bits.
    """
    options = {
        name: value
        for name in SamplingParams.__struct_fields__
        if (value := given.get(name)) not in (None, {})
    }
    if "top_k" in options:
        options["top_k"] = max(0, options["top_k"])
    if "seed" in options:
        options["seed"] %= 1 << 64
    if "logit_bias" in options:
        options["logit_bias"] = {int(id_): bias for id_, bias in options["logit_bias"].items()}
    return Sampling(options)


def stops_of(given: str | Sequence[str]) -> tuple[str, ...]:
    """One stop string, or several."""
    return (given,) if isinstance(given, str) else tuple(given)


def template_variables(
    given: Mapping[str, Any],
    enable_thinking: bool | None,
    verbosity: Verbosity | None,
    verbosity_field: str = "verbosity",
) -> Mapping[str, Any]:
    """Merge a caller's chat template variables with those that have a field of their own.

    Args:
        verbosity_field: the request's field that holds it, for errors.

    Raises:
        InvalidField: a variable has different values in the two.
    """
    for name, field, value in (
        ("enable_thinking", "enable_thinking", enable_thinking),
        ("verbosity", verbosity_field, verbosity),
    ):
        if value is None:
            continue
        sent = given.get(name, value)
        if (type(sent), sent) != (type(value), value):  # 1 is not true
            raise invalid(field, "differs from chat_template_kwargs: send one of them")
        given = {**given, name: value}
    return given


def continues(messages: Sequence[MessageItem]) -> bool:
    """Whether the last message says that the answer continues it."""
    return bool(messages) and messages[-1].prefix


def json_constraint(schema: dict[str, Any] | bool | str, field: str) -> dict[str, Constraint]:
    """The constraint to JSON that fits a schema, by the field that asks for it. A schema sent
    as text is passed through: the core checks it. Raises InvalidField for one that is too long.
    """
    if isinstance(schema, str):
        return {field: Constraint("json_schema", schema)}
    check_json_size(field, schema, MAX_SCHEMA)
    return {field: Constraint("json_schema", json.dumps(schema))}


def constrained(
    use: ToolUse | None, answer: Mapping[str, Constraint], output: Mapping[str, Constraint]
) -> dict[str, Any]:
    """The arguments of `GenerateCall` for tools and constraints.

    Args:
        use: the tools that the model may or must call.
        answer: the constraint on the answer, by the field that asks for it. If it is JSON, the
            model may call tools instead. A forced call replaces it, as in vLLM.
        output: constraints on all of the output, by field.

    Raises:
        InvalidField: two fields ask for different constraints, or one rules out a forced call.
    """
    field, constraint = "", None
    for name, wanted in (*answer.items(), *output.items()):
        if constraint is None:
            field, constraint = name, wanted
        elif wanted != constraint:
            raise invalid(name, f"conflicts with {field}: use one constraint")
    if use is not None and use.forced:
        if constraint is not None and not answer:
            raise invalid(field, "conflicts with a forced call: send one of them")
        return {"constraint": use.constraint(), "tools": use}
    free = constraint is None or (bool(answer) and constraint.kind == "json_schema")
    return {
        "constraint": constraint,
        "constraint_field": field,
        "tools": use if free else None,
    }


# -------------------- common fields
# Fields shared by chats, completions, and other APIs that use the same names.


def common(
    fields: CommonFields,
    base: str,
    use: ToolUse | None = None,
    answer: Mapping[str, Constraint] | None = None,
) -> dict[str, Any]:
    """The arguments of `GenerateCall` for `CommonFields`, except ``max_tokens``.

    Args:
        use: as in `constrained`.
        answer: as in `constrained`; None: taken from ``response_format``.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    options = fields.stream_options
    if fields.stream and fields.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "is not supported with stream: leave out one of them")
    if not fields.stream and options != StreamOptions():
        raise invalid("stream_options", "needs stream: set it to true")
    if options.continuous_usage_stats and not options.include_usage:
        raise invalid("stream_options.continuous_usage_stats", "needs include_usage")
    return {
        "adapter": adapter_named(fields.model, base),
        "sampling": sampling_of({**dict(fields), "seed": _same(fields, "seed", "random_seed")}),
        "stops": stops_of(fields.stop),
        "stop_token_ids": tuple(fields.stop_token_ids),
        "ignore_eos": fields.ignore_eos,
        "min_tokens": fields.min_tokens,
        "prompt_logprobs": fields.prompt_logprobs,
        "truncate_prompt": fields.truncate_prompt_tokens,
        "n": fields.n,
        "use_prefix_cache": _same(fields, "use_prefix_cache", "cache_prompt"),
        "cache_salt": fields.cache_salt,
        "priority": fields.priority,
        "session_key": session_key(fields.user),
        "prediction": "" if fields.prediction is None else fields.prediction.text,
        **constrained(
            use,
            _answer_constraint(fields.response_format) if answer is None else answer,
            _output_constraints(fields),
        ),
    }


def _same(fields: CommonFields, name: str, other: str) -> Any:
    """The value of a field with two names. Raises InvalidField if they differ."""
    value, again = getattr(fields, name), getattr(fields, other)
    if value is not None and again is not None and value != again:
        raise invalid(other, f"differs from {name}: send one of them")
    return again if value is None else value


def answer_form(
    fields: CommonFields, own: ScoreForm, prompts: list[ScoreForm], *, prompt_copies: int
) -> AnswerForm:
    """The `AnswerForm` of an answer whose scores and token ids are as in chats or completions.

    Args:
        own, prompts: as in `AnswerForm`.
        prompt_copies: how often an answer repeats the scores and token ids of a prompt.
    """
    numbered, ids = fields.return_tokens_as_token_ids, _ID if fields.return_token_ids else 0
    return AnswerForm(
        replace(own, numbered=numbered),
        # vLLM's own form always names tokens by their text.
        tuple(
            replace(each, copies=prompt_copies, numbered=numbered and each is not PROMPT_SCORES)
            for each in prompts
        ),
        ids=ids,
        prompt_ids=ids * prompt_copies,
        prompt_field="output.echo" if prompts[:1] == [_ECHO] else "output.prompt_logprobs",
    )


def _output_constraints(fields: CommonFields) -> dict[str, Constraint]:
    """Constraints on all of the output, from llama.cpp's and vLLM's fields, by field."""
    more = fields.structured_outputs or StructuredOutputs()
    found: dict[str, Constraint] = {}
    schemas = {
        "guided_json": fields.guided_json,
        "json_schema": fields.json_schema,
        "structured_outputs.json": more.json_,
    }
    for name, schema in schemas.items():
        if schema is not None:
            found |= json_constraint(schema, name)
    if more.json_object:
        found["structured_outputs.json_object"] = ANY_OBJECT
    texts: Mapping[str, tuple[Literal["regex", "grammar"], str | None]] = {
        "guided_regex": ("regex", fields.guided_regex),
        "regex": ("regex", fields.regex),
        "structured_outputs.regex": ("regex", more.regex),
        "guided_grammar": ("grammar", fields.guided_grammar),
        "structured_outputs.grammar": ("grammar", more.grammar),
    }
    for name, (kind, text) in texts.items():
        if text is not None:
            found[name] = Constraint(kind, text)
    choices = {
        "guided_choice": fields.guided_choice,
        "structured_outputs.choice": more.choice,
    }
    for name, one_of in choices.items():
        if one_of is not None:
            found[name] = choice(one_of, name)
    return found


def _answer_constraint(given: ResponseFormat | None) -> dict[str, Constraint]:
    """The constraint in ``response_format``, by field; empty if any text is allowed. Raises
    InvalidField."""
    if given is None:
        return {}
    field, value = "response_format", given.value if given.schema_ is None else given.schema_
    if given.json_schema is not None:
        if given.type != "json_schema":
            raise invalid(f"{field}.json_schema", "needs the type 'json_schema'")
        value = given.json_schema.schema_
    if given.type == "text":
        return {}
    if given.type == "regex":
        if not isinstance(value, str):
            raise invalid(f"{field}.value", "is not a string: send the regular expression")
        return {field: Constraint("regex", value)}
    if value is None:
        if given.type == "json_schema":
            raise invalid(f"{field}.json_schema", "is missing: send the schema")
        return {field: ANY_OBJECT}
    if given.type == "json_schema" and isinstance(value, dict) and value.keys() == _NAMED:
        value = value["schema"]  # Hugging Face's TGI puts name and schema in there
    return json_constraint(value, field)


# -------------------- chats and completions


def chat_call(fields: ChatFields, base: str, ignored: Ignored | None = None) -> GenerateCall:
    """The call for a chat request.

    Args:
        ignored: collects unsupported tools; None: they are refused.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    use, messages = tools_of(fields, ignored), template_messages(fields.messages)
    max_tokens = fields.max_tokens
    if fields.max_completion_tokens is not None:
        if max_tokens not in (None, fields.max_completion_tokens):
            raise invalid("max_completion_tokens", "differs from max_tokens: send one of them")
        max_tokens = fields.max_completion_tokens
    if fields.top_logprobs and not fields.logprobs:
        raise invalid("top_logprobs", "needs logprobs: set it to true")
    options = TemplateOptions.of(
        template_variables(
            fields.chat_template_kwargs, fields.enable_thinking, fields.verbosity
        ),
        fields.reasoning_effort,
        fields.add_generation_prompt,
        fields.continue_final_message or continues(fields.messages),
    )
    return GenerateCall(
        input=ChatMessages(messages, options, () if use is None else use.tools),
        form=answer_form(fields, CHAT_SCORES, [PROMPT_SCORES], prompt_copies=1),
        include_reasoning=fields.include_reasoning,
        max_tokens=max_tokens,
        open_ended=True,
        clamped=True,  # opencode and qwen-code ask for 32,000, however large the context is
        logprobs=fields.logprobs,
        top_logprobs=fields.top_logprobs,
        **common(fields, base, use),
    )


def completion_calls(fields: CompletionFields, base: str) -> list[GenerateCall]:
    """A call for each prompt.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    check_best_of(fields.best_of, fields.n)
    echoed = [_ECHO] if fields.echo and fields.logprobs is not None else []
    scored = [PROMPT_SCORES] if fields.prompt_logprobs is not None else []
    shared = common(fields, base)
    form = answer_form(fields, _ECHO, [*echoed, *scored], prompt_copies=fields.n)
    return [
        GenerateCall(
            form=form,
            input=PromptText(prompt) if isinstance(prompt, str) else PromptTokens(prompt),
            max_tokens=_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens,
            logprobs=fields.logprobs is not None,
            top_logprobs=fields.logprobs or 0,
            echo=fields.echo,
            **shared,
        )
        for prompt in _prompts(fields.prompt)
    ]


def check_best_of(best_of: int | None, n: int) -> None:
    """Raise InvalidField if the number of candidates differs from that of answers."""
    if best_of not in (None, n):
        raise invalid("best_of", "is not supported: use n, and choose by log-probability")


def _prompts(given: str | list[Any]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt", "is empty: send at least one")
    # `CompletionFields` allows no other type next to them.
    return [given] if isinstance(given[0], int) else given
