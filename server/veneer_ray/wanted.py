"""What the router needs to know of a request, from the gRPC API or the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from veneer_proto.v1 import adapters_pb2, inference_pb2
from veneer_server.routing.records import Wanted

from veneer_ray.calls import Metadata
from veneer_ray.digests import Digests

_TOKENS: Final = 128
"""Output tokens assumed for a request without a limit. 4 bytes of prompt count as a token."""


async def of_request(request: Any, digests: Digests, metadata: Metadata) -> Wanted:
    """`Wanted` of a gRPC request. A request that names no adapter may go to any replica."""
    match request:
        case inference_pb2.GenerateRequest():
            size = request.ByteSize() / 4
            work = size + 2.0 * (request.stopping.max_tokens or _TOKENS)
            digest = await digests.of(request.adapter, metadata)
            return Wanted(digest, request.session_key, work)
        case adapters_pb2.ActivateAdapterRequest() | adapters_pb2.EvictAdapterRequest():
            return Wanted(await digests.of(request.name, metadata))
    return Wanted()


async def of_body(
    body: Mapping[str, Any], digests: Digests, headers: tuple[tuple[str, str], ...]
) -> Wanted:
    """`Wanted` of an HTTP request's JSON, which has not been validated yet."""
    model, session = body.get("model"), body.get("prompt_cache_key") or body.get("user")
    if not isinstance(model, str):
        return Wanted()
    bound = body.get("max_completion_tokens") or body.get("max_tokens")
    prompt = body.get("prompt") or body.get("messages") or body.get("input") or ""
    work = len(str(prompt)) / 4 + 2.0 * (bound if isinstance(bound, int) else _TOKENS)
    return Wanted(
        await digests.of(model, headers),
        session if isinstance(session, str) else "",
        max(1.0, work),
    )
