"""Converts checked JSON fields to `GenerateCall`s."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from veneer_server.openai.fields import (
    ChatFields,
    CommonFields,
    CompletionFields,
    StreamOptions,
)
from veneer_server.openai.tools.requests import template_messages, tools_of
from veneer_server.serving.answer_room import AnswerForm, ScoreForm
from veneer_server.serving.checks import MAX_SCHEMA, check_json_size, choice, invalid
from veneer_server.serving.records import (
    ChatMessages,
    GenerateCall,
    PromptText,
    PromptTokens,
    Sampling,
)
from veneer_server.serving.tools.use import ToolUse
from veneer_server.text.templates.options import TemplateOptions
from veneer_server.wire.messages import Constraint, SamplingParams

__all__ = ["CHAT_SCORES", "chat_call", "completion_calls", "conversation_call"]

_COMPLETION_TOKENS: Final = 16
"""max_tokens of a completion that sets none, as in OpenAI and vLLM. Clients of this older
endpoint rely on it: one that has to wait for hundreds of tokens times out and retries."""


_ECHO: Final = ScoreForm(own=72, top=32, named=2)
"""``"a",-1.5,{"a":-1.5,"b":-2.5},17``: numbers have 24 characters at most."""

CHAT_SCORES: Final = ScoreForm(own=92, top=68, listed=4)
"""``{"token":"a","logprob":-1.5,"bytes":[97],"top_logprobs":[]}``."""

_PROMPT: Final = ScoreForm(own=94, top=90)
"""``"17":{"logprob":-1.5,"rank":1,"decoded_token":"a"}``."""

_ID: Final = 8


def chat_call(fields: ChatFields, base: str) -> GenerateCall:
    """The call for a chat request.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    return conversation_call(fields, template_messages(fields.messages), tools_of(fields), base)


def conversation_call(
    fields: ChatFields,
    messages: tuple[Mapping[str, Any], ...],
    use: ToolUse | None,
    base: str,
    form: AnswerForm | None = None,
) -> GenerateCall:
    """The call that continues a conversation.

    Args:
        fields: everything but messages and tools.
        messages: as a chat template gets them.
        use: the tools that may be called.
        form: of its scores; None: as chats have them.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    max_tokens = fields.max_tokens
    if fields.max_completion_tokens is not None:
        if max_tokens not in (None, fields.max_completion_tokens):
            raise invalid("max_completion_tokens", "differs from max_tokens: send one of them")
        max_tokens = fields.max_completion_tokens
    if fields.top_logprobs and not fields.logprobs:
        raise invalid("top_logprobs", "needs logprobs: set it to true")
    common = _common(fields, base)
    if use is not None and use.forced:
        if common["constraint"] is not None and fields.response_format is None:
            raise invalid(
                "structured_outputs", "conflicts with a forced call: send one of them"
            )
        # As in vLLM, the call takes the place of a response format.
        common["constraint"] = use.constraint()
    # Only a response format leaves room for calls; vLLM's options are for all of the output.
    free = common["constraint"] is None or fields.response_format is not None
    options = TemplateOptions.of(
        fields.chat_template_kwargs,
        fields.reasoning_effort,
        fields.add_generation_prompt,
        fields.continue_final_message,
    )
    return GenerateCall(
        input=ChatMessages(messages, options, () if use is None else use.tools),
        form=form or _form(fields, CHAT_SCORES, [_PROMPT], prompt_copies=1),
        include_reasoning=fields.include_reasoning,
        max_tokens=max_tokens,
        logprobs=fields.logprobs,
        top_logprobs=fields.top_logprobs,
        echo=False,
        tools=use if free or (use is not None and use.forced) else None,
        **common,
    )


def completion_calls(fields: CompletionFields, base: str) -> list[GenerateCall]:
    """A call for each prompt.

    Raises:
        InvalidField: fields contradict each other, or one is outside its range.
    """
    if fields.best_of is not None and fields.best_of != fields.n:
        raise invalid("best_of", "is not supported: use n, and choose by log-probability")
    common = _common(fields, base)
    echoed = [_ECHO] if fields.echo and fields.logprobs is not None else []
    scored = [_PROMPT] if fields.prompt_logprobs is not None else []
    form = _form(fields, _ECHO, [*echoed, *scored], prompt_copies=fields.n)
    return [
        GenerateCall(
            form=form,
            input=PromptText(prompt) if isinstance(prompt, str) else PromptTokens(prompt),
            max_tokens=_COMPLETION_TOKENS if fields.max_tokens is None else fields.max_tokens,
            logprobs=fields.logprobs is not None,
            top_logprobs=fields.logprobs or 0,
            echo=fields.echo,
            **common,
        )
        for prompt in _prompts(fields.prompt)
    ]


def _form(
    fields: CommonFields, own: ScoreForm, prompts: list[ScoreForm], *, prompt_copies: int
) -> AnswerForm:
    """Args: prompt_copies: how often an answer has what belongs to a prompt."""
    numbered, ids = fields.return_tokens_as_token_ids, _ID if fields.return_token_ids else 0
    return AnswerForm(
        replace(own, numbered=numbered),
        # vLLM's own form always names tokens by their text.
        tuple(
            replace(each, copies=prompt_copies, numbered=numbered and each is not _PROMPT)
            for each in prompts
        ),
        ids=ids,
        prompt_ids=ids * prompt_copies,
        prompt_field="output.echo" if prompts[:1] == [_ECHO] else "output.prompt_logprobs",
    )


def _prompts(given: str | list[Any]) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise invalid("prompt", "is empty: send at least one")
    # `CompletionFields` allows no other type next to them.
    return [given] if isinstance(given[0], int) else given


def _check_options(fields: CommonFields) -> None:
    options = fields.stream_options
    if fields.stream and fields.prompt_logprobs is not None:
        raise invalid("prompt_logprobs", "is not supported with stream: leave out one of them")
    if not fields.stream and options != StreamOptions():
        raise invalid("stream_options", "needs stream: set it to true")
    if options.continuous_usage_stats and not options.include_usage:
        raise invalid("stream_options.continuous_usage_stats", "needs include_usage")


def _common(fields: CommonFields, base: str) -> dict[str, Any]:
    """The arguments of `GenerateCall` that both endpoints share."""
    _check_options(fields)
    return {
        "adapter": "" if fields.model == base else fields.model,
        "sampling": _sampling(fields),
        "stops": (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop),
        "stop_token_ids": tuple(fields.stop_token_ids),
        "ignore_eos": fields.ignore_eos,
        "min_tokens": fields.min_tokens,
        "prompt_logprobs": fields.prompt_logprobs,
        "truncate_prompt": fields.truncate_prompt_tokens,
        "n": fields.n,
        "constraint": _constraint(fields),
        "use_prefix_cache": fields.use_prefix_cache,
        "priority": fields.priority,
        # Keeps a user on the same target of a canary. Hashed, as it may have any length.
        "session_key": hashlib.sha256(fields.user.encode()).hexdigest() if fields.user else "",
    }


def _sampling(fields: CommonFields) -> Sampling:
    """The options that are set; OpenAI and vLLM use the contract's names."""
    given = {
        name: value
        for name in SamplingParams.__struct_fields__
        if (value := getattr(fields, name)) not in (None, {})
    }
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])  # -1 means off, as in vLLM
    if fields.logit_bias:
        given["logit_bias"] = {int(token): bias for token, bias in fields.logit_bias.items()}
    return Sampling(given)


def _constraint(fields: CommonFields) -> Constraint | None:
    found: list[tuple[str, Constraint]] = []

    def add(name: str, constraint: Constraint) -> None:
        found.append((name, constraint))

    if (wanted := fields.response_format) is not None:
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise invalid("response_format.json_schema", "is missing: send the schema")
            schema = _schema_text(wanted.json_schema.schema_, "constraint.json_schema")
            add("response_format", Constraint("json_schema", schema))
        elif wanted.json_schema is not None:
            raise invalid("response_format.json_schema", "needs the type 'json_schema'")
        elif wanted.type == "json_object":
            add("response_format", Constraint("json_schema", '{"type": "object"}'))
    if fields.guided_json is not None:
        add(
            "guided_json",
            Constraint("json_schema", _schema_text(fields.guided_json, "guided_json")),
        )
    if fields.guided_regex is not None:
        add("guided_regex", Constraint("regex", fields.guided_regex))
    if fields.guided_choice is not None:
        add("guided_choice", choice(fields.guided_choice))
    if fields.guided_grammar is not None:
        add("guided_grammar", Constraint("grammar", fields.guided_grammar))
    if (more := fields.structured_outputs) is not None:
        if more.json_ is not None:
            add(
                "structured_outputs",
                Constraint("json_schema", _schema_text(more.json_, "structured_outputs.json")),
            )
        if more.json_object:
            add("structured_outputs", Constraint("json_schema", '{"type": "object"}'))
        if more.regex is not None:
            add("structured_outputs", Constraint("regex", more.regex))
        if more.choice is not None:
            add("structured_outputs", choice(more.choice))
        if more.grammar is not None:
            add("structured_outputs", Constraint("grammar", more.grammar))
    if len(found) > 1:
        raise invalid(found[1][0], f"conflicts with {found[0][0]}: use one constraint")
    return found[0][1] if found else None


def _schema_text(schema: dict[str, Any] | bool | str, field: str) -> str:
    """A schema as JSON text. One sent as text is passed through: the core checks it."""
    if isinstance(schema, str):
        return schema
    check_json_size(field, schema, MAX_SCHEMA)
    return json.dumps(schema)
