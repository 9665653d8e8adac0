"""Protobuf to frozen records and back. Protobuf goes no further into the server.

Every request field is checked on the way in; ranges are in `veneer_server.serving.checks`.
"""

from __future__ import annotations

import math
from typing import Final, NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from veneer_proto.v1 import inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import Unimplemented

from veneer_server.serving.checks import (
    MAX_MESSAGES,
    checked_constraint,
    checked_n,
    checked_sampling,
    checked_stop_token_ids,
    checked_stops,
    checked_top_logprobs,
    refuse,
)
from veneer_server.serving.records import (
    ChatMessages,
    FinishReason,
    GenerateCall,
    PromptText,
    PromptTokens,
    Provenance,
    Sampling,
)

MAX_SESSION_KEY: Final = 256

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
]

# ----------------------------------------------------------------------- requests


def _later(field: str, instead: str) -> NoReturn:
    raise Unimplemented(
        f"{field} is not served by this version yet: {instead}", metadata={"field": field}
    )


def generate_call(request: inference_pb2.GenerateRequest) -> GenerateCall:
    """Check a request.

    Raises:
        InvalidField: a value is outside its range.
        Unimplemented: a field of a later version is set.
    """
    _refuse_later(request)
    stopping = request.stopping
    max_tokens = stopping.max_tokens if stopping.HasField("max_tokens") else None
    if max_tokens == 0:
        refuse("stopping.max_tokens", "is 0: ask for at least 1 token, or leave it unset")
    return GenerateCall(
        adapter=request.adapter,
        input=_input(request),
        sampling=checked_sampling(request.sampling),
        max_tokens=max_tokens,
        stops=checked_stops(stopping.stop),
        ignore_eos=stopping.ignore_eos,
        logprobs=request.output.logprobs,
        echo=request.output.echo,
        top_logprobs=checked_top_logprobs(request.output),
        n=checked_n(request.output),
        stop_token_ids=checked_stop_token_ids(stopping.stop_token_ids),
        constraint=checked_constraint(request),
        use_prefix_cache=(
            request.use_prefix_cache if request.HasField("use_prefix_cache") else None
        ),
        session_key=_session_key(request.session_key),
    )


def _refuse_later(request: inference_pb2.GenerateRequest) -> None:
    if request.adapters:
        _later("adapters", "name one adapter in `adapter`")


def _session_key(key: str) -> str:
    if len(key) > MAX_SESSION_KEY:
        refuse("session_key", f"has {len(key)} characters: give at most {MAX_SESSION_KEY}")
    return key


def _input(
    request: inference_pb2.GenerateRequest,
) -> PromptText | ChatMessages | PromptTokens:
    kind = request.WhichOneof("input")
    if kind == "prompt":
        if not request.prompt:
            refuse("prompt", "is empty: send at least one character")
        return PromptText(request.prompt)
    if kind == "messages":
        messages = request.messages.messages
        if not messages:
            refuse("messages", "is empty: send at least one message")
        if len(messages) > MAX_MESSAGES:
            refuse("messages", f"has {len(messages)}: send at most {MAX_MESSAGES}")
        for at, message in enumerate(messages):
            if not message.role or len(message.role) > 64:
                refuse(f"messages[{at}].role", "must be 1 to 64 characters, such as 'user'")
        return ChatMessages(tuple({"role": m.role, "content": m.content} for m in messages))
    if kind is None:
        refuse("input", "is missing: send prompt, messages or token_ids")
    if not request.token_ids.ids:
        refuse("token_ids", "is empty: send at least one token")
    # As protobuf holds them: their number is compared with the context before they are used.
    return PromptTokens(request.token_ids.ids)


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
    """The wire's name for why a sequence ended."""
    return _FINISH[reason]


def duration(seconds: float) -> Duration:
    """Of zero or more seconds."""
    fraction, whole = math.modf(max(0.0, seconds))
    return Duration(seconds=int(whole), nanos=int(fraction * 1e9))


def timestamp(unix_s: float) -> Timestamp:
    """Of seconds since 1970."""
    return Timestamp(seconds=int(unix_s), nanos=int(math.modf(unix_s)[0] * 1e9))


def provenance(record: Provenance) -> inference_pb2.Provenance:
    """As the wire has it."""
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
