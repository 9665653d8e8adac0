"""Protobuf to frozen records and back. Protobuf goes no further into the server.

Request fields are checked by the records that they go into; see `serving.records`.
"""

from __future__ import annotations

import math
from typing import Any, Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from veneer_proto.v1 import inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import Unimplemented

from veneer_server.rpc import convert_tools
from veneer_server.serving.answer_room import MAX_ANSWER, AnswerForm, ScoreForm
from veneer_server.serving.checks import choice, invalid, refuse
from veneer_server.serving.records import (
    ChatMessages,
    FinishReason,
    GenerateCall,
    PromptText,
    PromptTokens,
    Provenance,
    Sampling,
)
from veneer_server.serving.tools.use import ToolUse
from veneer_server.text.templates.options import TemplateOptions, kwargs_of
from veneer_server.wire.messages import Constraint

__all__ = [
    "ChatMessages",
    "FinishReason",
    "GenerateCall",
    "PromptText",
    "PromptTokens",
    "Provenance",
    "Sampling",
    "duration",
    "finish_reason",
    "generate_call",
    "provenance",
    "tier_from_proto",
    "tier_to_proto",
    "timestamp",
    "unix_seconds",
]

# ----------------------------------------------------------------------- requests


_SCORES: Final = ScoreForm(own=32, top=26)
"""A `TokenLogprob` without its text."""


def generate_call(
    request: inference_pb2.GenerateRequest, *, largest: int = MAX_ANSWER, instead: str = ""
) -> GenerateCall:
    """Convert a request.

    Args:
        largest, instead: see `AnswerForm`.

    Raises:
        InvalidField: a value is outside its range.
        Unimplemented: a field that is not supported yet is set.
    """
    if request.adapters:
        raise Unimplemented(
            "adapters (several at once) is not supported: name one adapter in `adapter`",
            metadata={"field": "adapters"},
        )
    stopping, output = request.stopping, request.output
    tools, constraint = convert_tools.tool_use(request), _constraint(request)
    if tools is not None and tools.forced:
        if constraint is not None:
            raise invalid("constraint", "conflicts with a forced call: send one of them")
        constraint = tools.constraint()
    return GenerateCall(
        adapter=request.adapter,
        input=_input(request, tools),
        sampling=_sampling(request.sampling),
        max_tokens=_optional(stopping, "max_tokens"),
        stops=tuple(stopping.stop),
        ignore_eos=stopping.ignore_eos,
        logprobs=output.logprobs,
        echo=output.echo,
        top_logprobs=output.top_logprobs,
        n=output.n if output.HasField("n") else 1,
        stop_token_ids=tuple(stopping.stop_token_ids),
        constraint=constraint,
        use_prefix_cache=_optional(request, "use_prefix_cache"),
        session_key=request.session_key,
        priority=request.priority,
        min_tokens=stopping.min_tokens,
        prompt_logprobs=_optional(output, "prompt_logprobs"),
        truncate_prompt=_optional(request, "truncate_prompt_tokens"),
        # Output of a given format holds no calls, unless it is one.
        tools=tools if constraint is None or (tools is not None and tools.forced) else None,
        form=AnswerForm(
            _SCORES,
            (_SCORES,),
            prompt_field="output.prompt_logprobs"
            if output.HasField("prompt_logprobs")
            else "output.echo",
            largest=largest,
            instead=instead,
        ),
    )


def _optional(message: Message, name: str) -> Any:
    return getattr(message, name) if message.HasField(name) else None


def _sampling(options: inference_pb2.SamplingOptions) -> Sampling:
    """The contract and the record use the same field names."""
    given = {field.name: value for field, value in options.ListFields()}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    return Sampling(given)


def _constraint(request: inference_pb2.GenerateRequest) -> Constraint | None:
    if not request.HasField("constraint"):
        return None
    given = request.constraint
    match given.WhichOneof("kind"):
        case "json_schema":
            return Constraint("json_schema", given.json_schema)
        case "regex":
            return Constraint("regex", given.regex)
        case "choice":
            return choice(given.choice.texts)
        case "grammar":
            return Constraint("grammar", given.grammar)
    raise invalid(
        "constraint", "is empty: give json_schema, regex, choice or grammar, or leave it unset"
    )


def _input(
    request: inference_pb2.GenerateRequest, tools: ToolUse | None
) -> PromptText | ChatMessages | PromptTokens:
    match request.WhichOneof("input"):
        case "prompt":
            return PromptText(request.prompt)
        case "messages":
            return ChatMessages(
                convert_tools.messages(request.messages.messages),
                _template_options(request.template),
                () if tools is None else tools.tools,
            )
        case "token_ids":
            # Not copied: their number is first compared with the context length.
            return PromptTokens(request.token_ids.ids)
    raise invalid("input", "is missing: send prompt, messages or token_ids")


def _template_options(given: inference_pb2.TemplateOptions) -> TemplateOptions:
    return TemplateOptions.of(
        kwargs_of(given.kwargs) if given.kwargs else {},
        given.reasoning_effort or None,
        _optional(given, "add_generation_prompt"),
        given.continue_final_message,
    )


# ---------------------------------------------------------------------- responses

_TIERS: Final = {
    Tier.REMOTE: inference_pb2.TIER_REMOTE,
    Tier.DISK: inference_pb2.TIER_DISK,
    Tier.HOST: inference_pb2.TIER_HOST,
    Tier.DEVICE: inference_pb2.TIER_DEVICE,
}
_TIERS_BACK: Final = {value: key for key, value in _TIERS.items()}
_FINISH: Final = {
    "stop": inference_pb2.FINISH_REASON_STOP,
    "length": inference_pb2.FINISH_REASON_LENGTH,
    "cancelled": inference_pb2.FINISH_REASON_CANCELLED,
    "tool_calls": inference_pb2.FINISH_REASON_TOOL_CALLS,
}


def tier_to_proto(tier: Tier | None) -> inference_pb2.Tier:
    """TIER_UNSPECIFIED for None."""
    return inference_pb2.TIER_UNSPECIFIED if tier is None else _TIERS[tier]


def tier_from_proto(tier: inference_pb2.Tier, field: str) -> Tier | None:
    """None for TIER_UNSPECIFIED.

    Raises:
        InvalidField: a number that the contract does not name.
    """
    if tier == inference_pb2.TIER_UNSPECIFIED:
        return None
    known = _TIERS_BACK.get(tier)
    if known is None:
        refuse(field, f"has the unknown value {tier}: use TIER_HOST or TIER_DEVICE")
    return known


def finish_reason(reason: FinishReason) -> inference_pb2.FinishReason:
    """The protobuf value of a finish reason."""
    return _FINISH[reason]


def duration(seconds: float) -> Duration:
    """From seconds; negative values become zero."""
    fraction, whole = math.modf(max(0.0, seconds))
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def unix_seconds(message: Timestamp, field: str) -> float:
    """Unix seconds. Raises InvalidField for a time that is none."""
    try:
        return message.ToNanoseconds() / 1e9
    except ValueError as error:
        raise invalid(field, f"is not a valid time: {error}") from error


def timestamp(unix_s: float) -> Timestamp:
    """From Unix seconds."""
    return Timestamp(seconds=int(unix_s), nanos=int(math.modf(unix_s)[0] * 1e9))


def provenance(record: Provenance) -> inference_pb2.Provenance:
    """The protobuf form of a provenance record."""
    return inference_pb2.Provenance(
        adapter=record.adapter,
        revision=record.revision,
        weights_digest=record.weights_digest,
        tier=tier_to_proto(record.tier),
        base_model=record.base_model,
        timings=inference_pb2.Timings(
            queue=duration(record.queue_s),
            adapter_load=duration(record.load_s),
            time_to_first_token=duration(record.first_token_s),
            total=duration(record.total_s),
        ),
    )
