"""Protobuf to frozen records and back. Protobuf goes no further into the server.

Every request field is checked here, so that one place owns the sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, NoReturn

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from veneer_proto.v1 import inference_pb2
from veneer_registry.adapter import Tier
from veneer_registry.errors import InvalidField, Unimplemented

from veneer_server.engine.messages import Constraint

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

MAX_STOPS: Final = 16
MAX_STOP_LENGTH: Final = 256
MAX_TEMPERATURE: Final = 100.0

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class PromptText:
    """Text to be tokenised as it stands."""

    text: str


@dataclass(frozen=True, slots=True)
class ChatMessages:
    """Messages (role, content) for a chat template."""

    messages: tuple[Mapping[str, str], ...]


@dataclass(frozen=True, slots=True)
class PromptTokens:
    """Token ids, not yet checked against the vocabulary."""

    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling as given; None is unset. ``temperature`` 0 is greedy, ``top_k`` 0 off."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A checked `GenerateRequest`.

    Attributes:
        adapter: ``name`` or ``name@revision``; empty for the base model.
        max_tokens: None means up to the context's end.
        n: samples for the same prompt.
        use_prefix_cache: None means the server's default.
    """

    adapter: str
    input: PromptText | ChatMessages | PromptTokens
    sampling: Sampling
    max_tokens: int | None
    stops: tuple[str, ...]
    ignore_eos: bool
    logprobs: bool
    echo: bool
    top_logprobs: int = 0
    n: int = 1
    stop_token_ids: tuple[int, ...] = ()
    constraint: Constraint | None = None
    use_prefix_cache: bool | None = None


@dataclass(frozen=True, slots=True)
class Provenance:
    """Which weights answered, and how long what took (seconds)."""

    base_model: str
    adapter: str = ""
    revision: str = ""
    weights_digest: str = ""
    tier: Tier | None = None
    queue_s: float = 0.0
    load_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


# ----------------------------------------------------------------------- requests


def _refuse(field: str, problem: str) -> NoReturn:
    raise InvalidField(f"{field} {problem}", metadata={"field": field})


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
        _refuse("stopping.max_tokens", "is 0: ask for at least 1 token, or leave it unset")
    return GenerateCall(
        adapter=request.adapter,
        input=_input(request),
        sampling=_sampling(request.sampling),
        max_tokens=max_tokens,
        stops=_stops(stopping.stop),
        ignore_eos=stopping.ignore_eos,
        logprobs=request.output.logprobs,
        echo=request.output.echo,
    )


def _refuse_later(request: inference_pb2.GenerateRequest) -> None:
    sampling = request.sampling
    for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        if sampling.HasField(name):
            _later(f"sampling.{name}", "use temperature, top_p and top_k")
    if sampling.logit_bias:
        _later("sampling.logit_bias", "use temperature, top_p and top_k")
    if request.stopping.stop_token_ids:
        _later("stopping.stop_token_ids", "use stop strings")
    if request.output.top_logprobs:
        _later("output.top_logprobs", "use output.logprobs")
    if request.session_key:
        _later("session_key", "name the adapter's revision")
    if request.output.HasField("n") and request.output.n != 1:
        _later("output.n", "send the request several times")
    if request.HasField("constraint"):
        _later("constraint", "ask for the form in the prompt")
    if request.adapters:
        _later("adapters", "name one adapter in `adapter`")


def _input(
    request: inference_pb2.GenerateRequest,
) -> PromptText | ChatMessages | PromptTokens:
    kind = request.WhichOneof("input")
    if kind == "prompt":
        if not request.prompt:
            _refuse("prompt", "is empty: send at least one character")
        return PromptText(request.prompt)
    if kind == "messages":
        messages = request.messages.messages
        if not messages:
            _refuse("messages", "is empty: send at least one message")
        for at, message in enumerate(messages):
            if not message.role or len(message.role) > 64:
                _refuse(f"messages[{at}].role", "must be 1 to 64 characters, such as 'user'")
        return ChatMessages(tuple({"role": m.role, "content": m.content} for m in messages))
    if kind == "token_ids":
        if not request.token_ids.ids:
            _refuse("token_ids", "is empty: send at least one token")
        return PromptTokens(tuple(request.token_ids.ids))
    _refuse("input", "is missing: send prompt, messages or token_ids")


def _sampling(options: inference_pb2.SamplingOptions) -> Sampling:
    temperature = options.temperature if options.HasField("temperature") else None
    if temperature is not None and not 0 <= temperature <= MAX_TEMPERATURE:
        _refuse(
            "sampling.temperature",
            f"is {temperature}: give 0 (greedy) to {MAX_TEMPERATURE:g}, or leave it unset",
        )
    top_p = options.top_p if options.HasField("top_p") else None
    if top_p is not None and not 0 < top_p <= 1:
        _refuse("sampling.top_p", f"is {top_p}: give more than 0 and at most 1")
    return Sampling(
        temperature=temperature,
        top_k=options.top_k if options.HasField("top_k") else None,
        top_p=top_p,
        seed=options.seed if options.HasField("seed") else None,
    )


def _stops(stops: Sequence[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        _refuse("stopping.stop", f"has {len(stops)} strings: give at most {MAX_STOPS}")
    for at, stop in enumerate(stops):
        if not 1 <= len(stop) <= MAX_STOP_LENGTH:
            _refuse(
                f"stopping.stop[{at}]",
                f"has {len(stop)} characters: give 1 to {MAX_STOP_LENGTH}",
            )
    return tuple(stops)


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
        _refuse(field, f"has the unknown value {tier}: use TIER_HOST or TIER_DEVICE")
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
