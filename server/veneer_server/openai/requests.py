"""From checked JSON fields to the protobuf requests that the core takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import InvalidField

from veneer_server.openai.fields import (
    ChatFields,
    CommonFields,
    CompletionFields,
    StreamOptions,
)

__all__ = ["chat_requests", "completion_requests"]

_ROLES: Final = {"developer": "system"}
"""OpenAI's newer name, which templates do not know: many leave such messages out."""

_COMPLETION_TOKENS: Final = 16
"""Of a completion that sets no max_tokens, as OpenAI and vLLM have it. Clients of this older
endpoint count on it: one that waits for hundreds of tokens times out and sends it again."""


def chat_requests(fields: ChatFields, base: str) -> list[inference_pb2.GenerateRequest]:
    """One request.

    Raises:
        InvalidField: fields contradict each other.
    """
    request = _common(fields, base)
    if fields.max_completion_tokens is not None:
        if fields.max_tokens not in (None, fields.max_completion_tokens):
            raise _refuse("max_completion_tokens", "differs from max_tokens: send one of them")
        request.stopping.max_tokens = fields.max_completion_tokens
    if fields.top_logprobs and not fields.logprobs:
        raise _refuse("top_logprobs", "needs logprobs: set it to true")
    request.output.logprobs = fields.logprobs
    request.output.top_logprobs = fields.top_logprobs
    if not fields.messages:
        raise _refuse("messages", "is empty: send at least one message")
    request.messages.messages.extend(
        inference_pb2.ChatMessage(
            role=_ROLES.get(message.role, message.role), content=message.content
        )
        for message in fields.messages
    )
    return [request]


def completion_requests(
    fields: CompletionFields, base: str
) -> list[inference_pb2.GenerateRequest]:
    """One request for each prompt.

    Raises:
        InvalidField: fields contradict each other.
    """
    if fields.best_of is not None and fields.best_of != fields.n:
        raise _refuse("best_of", "is not served: use n, and choose by log-probabilities")
    request = _common(fields, base)
    if fields.max_tokens is None:
        request.stopping.max_tokens = _COMPLETION_TOKENS
    request.output.echo = fields.echo
    if fields.logprobs is not None:
        request.output.logprobs = True
        request.output.top_logprobs = fields.logprobs
    requests = []
    for prompt in _prompts(fields.prompt):
        one = inference_pb2.GenerateRequest()
        one.CopyFrom(request)
        if isinstance(prompt, str):
            one.prompt = prompt
        else:
            one.token_ids.ids.extend(prompt)
        requests.append(one)
    return requests


def _prompts(
    given: str | list[int] | list[str] | list[list[int]],
) -> Sequence[str | list[int]]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise _refuse("prompt", "is empty: send at least one")
    ids = [one for one in given if isinstance(one, int)]
    if ids:
        return [ids]  # the fields' check lets no other kind stand beside them
    return [one for one in given if not isinstance(one, int)]


def _refuse(field: str, problem: str) -> InvalidField:
    return InvalidField(f"{field} {problem}", metadata={"field": field})


def _check_options(fields: CommonFields) -> None:
    options = fields.stream_options
    if not fields.stream and options != StreamOptions():
        raise _refuse("stream_options", "needs stream: set it to true")
    if options.continuous_usage_stats and not options.include_usage:
        raise _refuse("stream_options.continuous_usage_stats", "needs include_usage")


def _common(fields: CommonFields, base: str) -> inference_pb2.GenerateRequest:
    _check_options(fields)
    request = inference_pb2.GenerateRequest(
        adapter="" if fields.model == base else fields.model,
        # Whoever asks gets the same target of a canary each time. Of any length here.
        session_key=hashlib.sha256(fields.user.encode()).hexdigest() if fields.user else "",
    )
    sampling, stopping = request.sampling, request.stopping
    for name in (
        "temperature",
        "top_p",
        "min_p",
        "seed",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
    ):
        value = getattr(fields, name)
        if value is not None:
            setattr(sampling, name, value)
    if fields.top_k is not None:
        sampling.top_k = max(0, fields.top_k)  # -1 is off, as vLLM has it
    for token, bias in fields.logit_bias.items():
        sampling.logit_bias[int(token)] = bias
    if fields.max_tokens is not None:
        stopping.max_tokens = fields.max_tokens
    stopping.stop.extend([fields.stop] if isinstance(fields.stop, str) else fields.stop)
    stopping.stop_token_ids.extend(fields.stop_token_ids)
    stopping.ignore_eos = fields.ignore_eos
    if fields.n != 1:
        request.output.n = fields.n
    if fields.use_prefix_cache is not None:
        request.use_prefix_cache = fields.use_prefix_cache
    constraint = _constraint(fields)
    if constraint is not None:
        request.constraint.CopyFrom(constraint)
    return request


def _constraint(fields: CommonFields) -> inference_pb2.Constraint | None:
    found: list[tuple[str, inference_pb2.Constraint]] = []

    def add(name: str, **kind: Any) -> None:
        found.append((name, inference_pb2.Constraint(**kind)))

    if (wanted := fields.response_format) is not None:
        if wanted.type == "json_schema":
            if wanted.json_schema is None:
                raise _refuse("response_format.json_schema", "is missing: send the schema")
            schema = json.dumps(wanted.json_schema.schema_)
            add("response_format", json_schema=schema)
        elif wanted.json_schema is not None:
            raise _refuse("response_format.json_schema", "needs the type 'json_schema'")
        elif wanted.type == "json_object":
            add("response_format", json_schema='{"type": "object"}')
    if fields.guided_json is not None:
        add("guided_json", json_schema=_schema_text("guided_json", fields.guided_json))
    if fields.guided_regex is not None:
        add("guided_regex", regex=fields.guided_regex)
    if fields.guided_choice is not None:
        add("guided_choice", choice=inference_pb2.Choices(texts=fields.guided_choice))
    if (more := fields.structured_outputs) is not None:
        if more.json_ is not None:
            add(
                "structured_outputs", json_schema=_schema_text("structured_outputs", more.json_)
            )
        if more.json_object:
            add("structured_outputs", json_schema='{"type": "object"}')
        if more.regex is not None:
            add("structured_outputs", regex=more.regex)
        if more.choice is not None:
            add("structured_outputs", choice=inference_pb2.Choices(texts=more.choice))
    if len(found) > 1:
        raise _refuse(
            found[1][0], f"says once more what {found[0][0]} says: constrain the output once"
        )
    return found[0][1] if found else None


def _schema_text(field: str, schema: dict[str, Any] | bool | str) -> str:
    """A schema that came as JSON text stays as it is: the core checks it."""
    return schema if isinstance(schema, str) else json.dumps(schema)
