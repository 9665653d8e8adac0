"""Protobuf to records and back. Nothing else in the package reads a message."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2
from veneer_proto.v1 import adapters_pb2, inference_pb2, server_pb2
from veneer_registry.adapter import BaseFingerprint, Tier

from veneer_client.types import (
    AdapterDetails,
    AdapterInfo,
    BaseModel,
    Budgets,
    Chat,
    Chunk,
    Eviction,
    EvictMode,
    FinishReason,
    GenerateOptions,
    Generation,
    GenerationEnd,
    Prompt,
    Provenance,
    ServerInfo,
    ServingStatus,
    Text,
    Timings,
    TokenLogprob,
    Tokens,
    Usage,
)

__all__ = [
    "EVICT_MODES",
    "TIERS",
    "adapter_details",
    "adapter_info",
    "chunk",
    "eviction",
    "generate_request",
    "generation",
    "generation_end",
    "server_info",
    "serving_status",
]

TIERS: Final = {
    Tier.REMOTE: inference_pb2.TIER_REMOTE,
    Tier.DISK: inference_pb2.TIER_DISK,
    Tier.HOST: inference_pb2.TIER_HOST,
    Tier.DEVICE: inference_pb2.TIER_DEVICE,
}
EVICT_MODES: Final = {
    EvictMode.DRAIN: adapters_pb2.EVICT_MODE_DRAIN,
    EvictMode.FAIL_IF_BUSY: adapters_pb2.EVICT_MODE_FAIL_IF_BUSY,
    EvictMode.ABORT: adapters_pb2.EVICT_MODE_ABORT,
}
_TIER_OF: Final = {wire: tier for tier, wire in TIERS.items()}
_FINISH: Final = {
    inference_pb2.FINISH_REASON_STOP: FinishReason.STOP,
    inference_pb2.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    inference_pb2.FINISH_REASON_CANCELLED: FinishReason.CANCELLED,
}
_STATUS: Final = {
    health_pb2.HealthCheckResponse.SERVING: ServingStatus.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING: ServingStatus.NOT_SERVING,
}


def generate_request(prompt: Prompt, options: GenerateOptions) -> inference_pb2.GenerateRequest:
    """The wire form of a call; options that are left out stay unset."""
    request = inference_pb2.GenerateRequest(
        adapter=options.get("adapter", ""), request_id=options.get("request_id", "")
    )
    match prompt:
        case Text(text):
            request.prompt = text
        case Chat(messages):
            request.messages.SetInParent()
            for message in messages:
                request.messages.messages.add(role=message.role, content=message.content)
        case Tokens(ids):
            request.token_ids.SetInParent()
            request.token_ids.ids.extend(ids)
    if "temperature" in options:
        request.sampling.temperature = options["temperature"]
    if "top_p" in options:
        request.sampling.top_p = options["top_p"]
    if "top_k" in options:
        request.sampling.top_k = options["top_k"]
    if "seed" in options:
        request.sampling.seed = options["seed"]
    if "max_tokens" in options:
        request.stopping.max_tokens = options["max_tokens"]
    request.stopping.stop.extend(options.get("stop", ()))
    request.stopping.ignore_eos = options.get("ignore_eos", False)
    request.output.logprobs = options.get("logprobs", False)
    request.output.echo = options.get("echo", False)
    return request


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
    )


def chunk(message: inference_pb2.GenerateStreamResponse) -> Chunk:
    """A piece of a stream."""
    return Chunk(
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=_logprobs(message.logprobs),
        prompt_logprobs=_logprobs(message.prompt_logprobs),
    )


def generation_end(message: inference_pb2.GenerateStreamResponse) -> GenerationEnd | None:
    """The end that a stream's last message carries; None in the others."""
    if not message.HasField("final"):
        return None
    final = message.final
    return GenerationEnd(
        request_id=message.request_id,
        finish_reason=_FINISH[final.finish_reason],
        usage=_usage(final.usage),
        provenance=_provenance(final.provenance),
    )


def adapter_info(message: adapters_pb2.Adapter) -> AdapterInfo:
    """One revision."""
    return AdapterInfo(
        name=message.name,
        revision=message.revision,
        weights_digest=message.weights_digest,
        base_model=message.base_model,
        rank=message.rank,
        targets=tuple(message.targets),
        parameters=message.parameters,
        size=message.bytes,
        tier=_TIER_OF.get(message.tier, Tier.DISK),
        pinned=message.pinned,
        leases=message.leases,
        created=_time(message.created),
        last_used=_time(message.last_used) if message.HasField("last_used") else None,
        labels=dict(message.labels),
        training=dict(message.training),
        current=message.current,
        etag=message.etag,
        has_chat_template=message.has_chat_template,
    )


def adapter_details(message: adapters_pb2.GetAdapterResponse) -> AdapterDetails:
    """An adapter and its name's revisions."""
    return AdapterDetails(
        adapter=adapter_info(message.adapter),
        revisions=tuple(adapter_info(revision) for revision in message.revisions),
    )


def eviction(message: adapters_pb2.EvictAdapterResponse) -> Eviction:
    """Outcome of an eviction."""
    return Eviction(evicted=message.evicted, freed_bytes=message.freed_bytes)


def server_info(message: server_pb2.GetServerInfoResponse) -> ServerInfo:
    """What the server is."""
    base, budgets = message.base_model, message.budgets
    parts = base.fingerprint
    return ServerInfo(
        version=message.version,
        base_model=BaseModel(
            name=base.name,
            architecture=base.architecture,
            quantization=base.quantization,
            dtype=base.dtype,
            parameters=base.parameters,
            size=base.bytes,
            fingerprint=BaseFingerprint(
                weights=parts.weights,
                tokenizer=parts.tokenizer,
                quantization=parts.quantization,
                template=parts.template,
            ),
        ),
        device=message.device,
        backend=message.backend,
        budgets=Budgets(
            host_adapter_bytes=budgets.host_adapter_bytes,
            device_adapter_bytes=budgets.device_adapter_bytes,
            kv_cache_bytes=budgets.kv_cache_bytes,
            kv_cache_tokens=budgets.kv_cache_tokens,
            max_batch_tokens=budgets.max_batch_tokens,
            max_running=budgets.max_running,
            max_queue=budgets.max_queue,
        ),
        context_length=message.context_length,
        uptime_s=_seconds(message.uptime),
        adapters_registered=message.adapters_registered,
        adapters_on_device=message.adapters_on_device,
        engine_starts=message.engine_starts,
    )


def serving_status(message: health_pb2.HealthCheckResponse) -> ServingStatus:
    """Answer of the health service."""
    return _STATUS.get(message.status, ServingStatus.UNKNOWN)


def _logprobs(messages: Iterable[inference_pb2.TokenLogprob]) -> tuple[TokenLogprob, ...]:
    return tuple(TokenLogprob(m.token_id, m.logprob) for m in messages)


def _usage(message: inference_pb2.Usage) -> Usage:
    return Usage(
        prompt_tokens=message.prompt_tokens,
        completion_tokens=message.completion_tokens,
        cached_prompt_tokens=message.cached_prompt_tokens,
    )


def _provenance(message: inference_pb2.Provenance) -> Provenance:
    timings = message.timings
    return Provenance(
        base_model=message.base_model,
        adapter=message.adapter,
        revision=message.revision,
        weights_digest=message.weights_digest,
        tier=_TIER_OF.get(message.tier),
        timings=Timings(
            queue_s=_seconds(timings.queue),
            adapter_load_s=_seconds(timings.adapter_load),
            time_to_first_token_s=_seconds(timings.time_to_first_token),
            total_s=_seconds(timings.total),
        ),
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
