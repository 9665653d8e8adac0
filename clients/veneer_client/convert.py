"""Converts protobuf messages of the generate calls to records and back.

`convert_admin` and `convert_server` convert those of the other services.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, Final, TypeVar, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from veneer_proto.v1 import inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import InvalidField

from veneer_client import convert_tools
from veneer_client.tool_types import ToolCallDelta
from veneer_client.types import (
    Chat,
    Chunk,
    FinishReason,
    GenerateOptions,
    Generation,
    GenerationEnd,
    Prompt,
    Provenance,
    Sample,
    Text,
    Timings,
    TokenLogprob,
    Tokens,
    TopLogprob,
    Usage,
)

__all__ = [
    "TIERS",
    "TIER_OF",
    "chunk",
    "generate_request",
    "generation",
    "generation_end",
    "same_names",
    "seconds",
]

Record = TypeVar("Record")

TIERS: Final = {
    Tier.REMOTE: inference_pb2.TIER_REMOTE,
    Tier.DISK: inference_pb2.TIER_DISK,
    Tier.HOST: inference_pb2.TIER_HOST,
    Tier.DEVICE: inference_pb2.TIER_DEVICE,
}
TIER_OF: Final = {wire: tier for tier, wire in TIERS.items()}
_FINISH: Final = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
    inference_pb2.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}
_SAMPLING: Final = tuple(
    field.name
    for field in inference_pb2.SamplingOptions.DESCRIPTOR.fields
    if field.name != "logit_bias"
)
"""Options that have the same name in the contract; biases are a map and set separately."""


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The wire form of a call; omitted options stay unset.

    Raises:
        TypeError: an unknown option, or something that is not a prompt.
        InvalidField: a value that the field cannot hold. The server checks ranges.
    """
    if unknown := sorted(options.keys() - GenerateOptions.__optional_keys__):
        raise TypeError(
            f"unknown option {unknown[0]!r}: the options are "
            f"{', '.join(sorted(GenerateOptions.__optional_keys__))}"
        )
    if not isinstance(prompt, Text | Chat | Tokens):
        raise TypeError(
            f"a prompt is a Text, Chat or Tokens, not {type(prompt).__name__}: Chat.user('Hi') "
            "is a user's turn in the chat template, Text('Hi') is tokenised verbatim"
        )
    try:
        return _request(prompt, options)
    except (TypeError, ValueError) as error:
        name = _unfit(prompt, options)
        raise InvalidField(
            f"{name} has a value of the wrong type or range ({error}): see GenerateOptions",
            metadata={"field": "options", "option": name},
        ) from error


def _unfit(prompt: Prompt, options: GenerateOptions) -> str:
    """Name the part that cannot be sent: the prompt, or the first option that cannot be sent
    alone."""
    try:
        _request(prompt, {})
    except (TypeError, ValueError):
        return "the prompt"
    for name, value in options.items():
        alone: Any = {name: value}
        try:
            _request(prompt, alone)
        except InvalidField:  # it needs another option
            continue
        except (TypeError, ValueError):
            return name
    return "an option"


def _request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(
        adapter=options.get("adapter", ""),
        request_id=options.get("request_id", ""),
        session_key=options.get("session_key", ""),
        priority=options.get("priority", 0),
    )
    match prompt:
        case Text(text):
            request.prompt = text
        case Chat(messages):
            request.messages.SetInParent()
            for message in messages:
                convert_tools.add_message(request.messages, message)
        case Tokens(ids):
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(ids)
    given: Mapping[str, object] = options
    for name in _SAMPLING:
        if name in given:
            setattr(request.sampling, name, given[name])
    request.sampling.logit_bias.update(options.get("logit_bias", {}))
    if "max_tokens" in options:
        request.stopping.max_tokens = options["max_tokens"]
    request.stopping.stop.extend(options.get("stop", ()))
    request.stopping.stop_token_ids.extend(options.get("stop_token_ids", ()))
    request.stopping.ignore_eos = options.get("ignore_eos", False)
    request.stopping.min_tokens = options.get("min_tokens", 0)
    if "prompt_logprobs" in options:
        request.output.prompt_logprobs = options["prompt_logprobs"]
    request.output.top_logprobs = options.get("top_logprobs", 0)
    request.output.logprobs = options.get("logprobs", request.output.top_logprobs > 0)
    request.output.echo = options.get("echo", False)
    if "n" in options:
        request.output.n = options["n"]
    if "use_prefix_cache" in options:
        request.use_prefix_cache = options["use_prefix_cache"]
    if "truncate_prompt_tokens" in options:
        request.truncate_prompt_tokens = options["truncate_prompt_tokens"]
    if "template_kwargs" in options:
        request.template.kwargs = json.dumps(options["template_kwargs"])
    if "reasoning_effort" in options:
        request.template.reasoning_effort = options["reasoning_effort"]
    if "continue_final_message" in options:
        request.template.continue_final_message = options["continue_final_message"]
    _constrain(request, options)
    convert_tools.offer(request, options)
    return request


def _constrain(request: inference_pb2.GenerateRequest, options: GenerateOptions) -> None:
    kinds = ("json_schema", "regex", "choice", "grammar")
    given = [name for name in kinds if name in options]
    if len(given) > 1:
        raise InvalidField(
            f"{' and '.join(given)} constrain the same output: give one of them",
            metadata={"field": "constraint", "given": " ".join(given)},
        )
    if "json_schema" in options:
        request.constraint.json_schema = json.dumps(options["json_schema"])
    elif "regex" in options:
        request.constraint.regex = options["regex"]
    elif "choice" in options:
        request.constraint.choice.SetInParent()
        request.constraint.choice.texts.extend(options["choice"])
    elif "grammar" in options:
        request.constraint.grammar = options["grammar"]


def generation(message: inference_pb2.GenerateResponse) -> Generation:
    """A whole answer."""
    return Generation(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        finish_reason=_FINISH[message.finish_reason],
        usage=_usage(message.usage),
        provenance=_provenance(message.provenance),
        others=tuple(
            Sample(
                text=sample.text,
                token_ids=tuple(sample.token_ids),
                logprobs=_logprobs(sample.logprobs),
                finish_reason=_FINISH[sample.finish_reason],
                reasoning=sample.reasoning,
                tool_calls=convert_tools.calls(sample.tool_calls),
            )
            for sample in message.others
        ),
        reasoning=message.reasoning,
        tool_calls=convert_tools.calls(message.tool_calls),
    )


def chunk(message: inference_pb2.GenerateStreamResponse) -> Chunk:
    """A piece of a stream."""
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
        index=message.index,
        finish_reason=_FINISH.get(message.finish_reason),
        reasoning=message.reasoning,
        tool_calls=tuple(
            ToolCallDelta(piece.index, piece.id, piece.name, piece.arguments)
            for piece in message.tool_calls
        ),
    )


def generation_end(message: inference_pb2.GenerateStreamResponse) -> GenerationEnd | None:
    """The end that a stream's last message carries; None for other messages."""
    if not message.HasField("final"):
        return None
    final = message.final
    return GenerationEnd(
        request_id=message.request_id,
        finish_reason=_FINISH[final.finish_reason],
        usage=_usage(final.usage),
        provenance=_provenance(final.provenance),
    )


def _logprobs(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            m.token_id,
            m.logprob,
            tuple(TopLogprob(t.token_id, t.logprob, t.token) for t in m.top),
            m.token,
            m.rank,
        )
        for m in messages
    )


def _usage(message: inference_pb2.Usage) -> Usage:
    return same_names(Usage, message)


def _provenance(message: inference_pb2.Provenance) -> Provenance:
    timings = message.timings
    return same_names(
        Provenance,
        message,
        tier=TIER_OF.get(message.tier),
        timings=Timings(
            queue_s=seconds(timings.queue),
            adapter_load_s=seconds(timings.adapter_load),
            time_to_first_token_s=seconds(timings.time_to_first_token),
            total_s=seconds(timings.total),
        ),
    )


def same_names(record: type[Record], message: Message, **others: object) -> Record:
    """A record from the message's fields of the same names, which must be numbers or strings,
    and from ``others``."""
    values: dict[str, object] = {
        field.name: getattr(message, field.name)
        for field in fields(cast(Any, record))
        if field.name not in others
    }
    assert all(isinstance(value, int | float | str) for value in values.values()), record
    return record(**values, **others)


def seconds(duration: Duration) -> float:
    """A protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9
