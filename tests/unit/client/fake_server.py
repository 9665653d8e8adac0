"""A FAKE server for client tests: the contract on a real socket, no model behind it.

Answers are functions of the request. Refusals that a test puts into `refusals` come
first, one a call; every call is noted in `calls`.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from veneer_proto.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

SERVICES = (
    "veneer.v1.InferenceService",
    "veneer.v1.AdapterService",
    "veneer.v1.ServerService",
    "grpc.health.v1.Health",
    reflection.SERVICE_NAME,
)


@dataclass(frozen=True)
class Refusal:
    """A status; without a reason it has no details, as a proxy's has none."""

    code: grpc.StatusCode
    message: str = "no"
    reason: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    retry_s: float | None = None
    domain: str = "veneer"

    def end(self, context: grpc.ServicerContext) -> None:
        if self.reason:
            status = status_pb2.Status(code=self.code.value[0], message=self.message)
            details: list[Any] = [
                error_details_pb2.ErrorInfo(
                    reason=self.reason, domain=self.domain, metadata=self.metadata
                )
            ]
            if self.retry_s is not None:
                delay = Duration()
                delay.FromNanoseconds(int(self.retry_s * 1e9))
                details.append(error_details_pb2.RetryInfo(retry_delay=delay))
            for detail in details:
                packed = AnyMessage()
                packed.Pack(detail)
                status.details.append(packed)
            context.set_trailing_metadata(
                (("grpc-status-details-bin", status.SerializeToString()),)
            )
        context.abort(self.code, self.message)


@dataclass
class Upload:
    """What one upload consisted of."""

    spec: adapters_pb2.UploadSpec
    chunks: list[adapters_pb2.UploadChunk]


class FakeServer(
    inference_pb2_grpc.InferenceServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    server_pb2_grpc.ServerServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """See the module's docstring; use it in a ``with``."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.refusals: deque[Refusal] = deque()
        self.uploads: list[Upload] = []
        self.adapters: dict[str, adapters_pb2.Adapter] = {}
        self.tier = inference_pb2.TIER_DISK
        # For streams: pieces that come before this event is waited for, if set.
        self.hold: threading.Event | None = None
        self.cancelled = threading.Event()
        self.begun = threading.Event()
        """A call reached its hold."""
        self.break_after: Refusal | None = None
        self.lost: Refusal | None = None
        """Ends a call that pinned an adapter."""
        self.omit_end = False
        self.pieces: list[inference_pb2.GenerateStreamResponse] = []
        """When set, what every stream says."""
        self.on_generate: Callable[[Any], Any] | None = None
        self._pool = ThreadPoolExecutor(8)
        # For watches: what each call tells, the first call the first list.
        self.watches: deque[list[adapters_pb2.WatchAdaptersResponse]] = deque()
        self.ready = True
        self._server = grpc.server(self._pool)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, self._server)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self, self._server)
        reflection.enable_server_reflection(SERVICES, self._server)
        self.address = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold is not None:
            self.hold.set()
        self._server.stop(None).wait()
        self._pool.shutdown()

    def count(self, method: str) -> int:
        """Calls of a method so far."""
        return sum(name == method for name, _ in self.calls)

    def add(self, name: str) -> adapters_pb2.Adapter:
        """Register an adapter without an upload."""
        digest = (name.encode().hex() * 64)[:64]
        adapter = adapters_pb2.Adapter(
            name=name,
            revision=digest,
            weights_digest=digest[::-1],
            base_model="fake-base",
            rank=4,
            targets=["q_proj"],
            parameters=100,
            bytes=200,
            tier=self.tier,
            current=True,
            etag="e1",
        )
        adapter.created.FromSeconds(1_700_000_000)
        self.adapters[name] = adapter
        return adapter

    def _note(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append((method, request))
        if self.refusals:
            self.refusals.popleft().end(context)

    # ------------------------------------------------------------------- inference

    def Generate(self, request, context):  # noqa: N802
        self._note("Generate", request, context)
        if self.hold is not None:
            context.add_callback(self.cancelled.set)
            self.begun.set()
            self.hold.wait()
        if self.on_generate is not None:
            return self.on_generate(request)
        return inference_pb2.GenerateResponse(
            request_id=request.request_id or "made-here",
            text=f"{request.adapter}>{request.prompt}",
            token_ids=[7, 8],
            finish_reason=inference_pb2.FINISH_REASON_STOP,
            logprobs=[inference_pb2.TokenLogprob(token_id=7, logprob=-0.5)],
            usage=inference_pb2.Usage(prompt_tokens=3, completion_tokens=2),
            provenance=self._provenance(request.adapter),
        )

    def GenerateStream(self, request, context):  # noqa: N802
        self._note("GenerateStream", request, context)
        context.add_callback(self.cancelled.set)
        if self.pieces:
            yield from self.pieces
            return
        wanted = request.stopping.max_tokens or 3
        for number in range(wanted):
            yield inference_pb2.GenerateStreamResponse(
                request_id="s", text=f"{number} ", token_ids=[number]
            )
            if number == 0 and self.hold is not None:
                self.begun.set()
                self.hold.wait()
            if number == 0 and self.break_after is not None:
                self.break_after.end(context)
        if self.omit_end:
            return
        yield inference_pb2.GenerateStreamResponse(
            request_id="s",
            final=inference_pb2.GenerateStreamFinal(
                finish_reason=inference_pb2.FINISH_REASON_LENGTH,
                usage=inference_pb2.Usage(prompt_tokens=1, completion_tokens=wanted),
                provenance=self._provenance(request.adapter),
            ),
        )

    def _provenance(self, adapter: str) -> inference_pb2.Provenance:
        made = inference_pb2.Provenance(base_model="fake-base", adapter=adapter)
        if adapter:
            made.revision, made.weights_digest, made.tier = "ab" * 32, "cd" * 32, self.tier
        made.timings.queue.FromMilliseconds(2)
        made.timings.adapter_load.FromMilliseconds(41)
        made.timings.time_to_first_token.FromMilliseconds(88)
        made.timings.total.FromMilliseconds(188)
        return made

    # -------------------------------------------------------------------- adapters

    def UploadAdapter(self, request_iterator: Iterable[Any], context):  # noqa: N802
        messages: Iterator[Any] = iter(request_iterator)
        spec = next(messages).spec
        self._note("UploadAdapter", spec, context)
        self.uploads.append(Upload(spec, [message.chunk for message in messages]))
        return adapters_pb2.UploadAdapterResponse(
            published=not spec.validate_only and spec.name not in self.adapters,
            adapter=self.add(spec.name),
            warnings=["server says"],
        )

    def GetAdapter(self, request, context):  # noqa: N802
        self._note("GetAdapter", request, context)
        adapter = self._find(request.name, context)
        return adapters_pb2.GetAdapterResponse(adapter=adapter, revisions=[adapter])

    def _find(self, spec: str, context: grpc.ServicerContext) -> adapters_pb2.Adapter:
        name, _, revision = spec.partition("@")
        adapter = self.adapters.get(name)
        if adapter is None or not adapter.revision.startswith(revision):
            Refusal(
                grpc.StatusCode.NOT_FOUND,
                "no such adapter",
                "ADAPTER_NOT_FOUND",
                {"did_you_mean": "chat"},
            ).end(context)
            raise AssertionError("end raises")
        return adapter

    def ListAdapters(self, request, context):  # noqa: N802
        self._note("ListAdapters", request, context)
        names = sorted(n for n in self.adapters if n.startswith(request.name_prefix))
        start = int(request.page_token or 0)
        end = start + (request.page_size or 100)
        return adapters_pb2.ListAdaptersResponse(
            adapters=[self.adapters[name] for name in names[start:end]],
            next_page_token=str(end) if end < len(names) else "",
        )

    def ActivateAdapter(self, request, context):  # noqa: N802
        self._note("ActivateAdapter", request, context)
        adapter = self._find(request.name, context)
        adapter.tier, adapter.pinned = request.tier, request.pin
        return adapters_pb2.ActivateAdapterResponse(adapter=adapter)

    def UpdateAdapter(self, request, context):  # noqa: N802
        self._note("UpdateAdapter", request, context)
        adapter = self._find(request.name, context)
        adapter.pinned = request.pinned
        if self.hold is not None and request.pinned:
            self.begun.set()
            self.hold.wait()
        if self.lost is not None and request.pinned:
            self.lost.end(context)
        return adapters_pb2.UpdateAdapterResponse(adapter=adapter)

    def WatchAdapters(self, request, context):  # noqa: N802
        self._note("WatchAdapters", request, context)
        context.add_callback(self.cancelled.set)
        yield from self.watches.popleft()
        if self.break_after is not None:
            broken, self.break_after = self.break_after, None
            broken.end(context)
        if self.hold is not None:
            self.hold.wait()

    def EvictAdapter(self, request, context):  # noqa: N802
        self._note("EvictAdapter", request, context)
        return adapters_pb2.EvictAdapterResponse(evicted=True, freed_bytes=200)

    def DeleteAdapter(self, request, context):  # noqa: N802
        self._note("DeleteAdapter", request, context)
        gone = self.adapters.pop(request.name)
        return adapters_pb2.DeleteAdapterResponse(revisions=[gone.revision])

    # ---------------------------------------------------------------------- server

    def GetServerInfo(self, request, context):  # noqa: N802
        self._note("GetServerInfo", request, context)
        return server_pb2.GetServerInfoResponse(
            version="9.9",
            base_model=server_pb2.BaseModel(name="fake-base", quantization="nf4"),
            device="cpu",
            backend="fake",
            context_length=128,
            engine_starts=1,
            memory=server_pb2.Memory(
                pools=[
                    server_pb2.MemoryPool(
                        name="host",
                        uses=[
                            server_pb2.MemoryUse(name="base", bytes=1024),
                            server_pb2.MemoryUse(name="kv_cache", bytes=2048),
                        ],
                        total_bytes=3072,
                        limit_bytes=4096,
                    )
                ],
                front_peak_bytes=512,
                engine_peak_bytes=2560,
            ),
        )

    def PlanCapacity(self, request, context):  # noqa: N802
        self._note("PlanCapacity", request, context)
        short = server_pb2.Shortfall(
            limit=server_pb2.LIMIT_KV_CACHE,
            flag="--kv-cache-bytes",
            needed=9,
            available=5,
            message="raise --kv-cache-bytes from 5 to 9",
        )
        return server_pb2.PlanCapacityResponse(
            adapters=server_pb2.AdapterCapacity(
                parameters=10, bytes=20, on_device=3, on_host=4
            ),
            sequences=server_pb2.SequenceCapacity(
                context_length=64,
                bytes=2048,
                running=5,
                limited_by=server_pb2.LIMIT_KV_CACHE,
            ),
            fits=request.concurrency <= 5,
            shortfalls=[] if request.concurrency <= 5 else [short],
        )

    def Check(self, request, context):  # noqa: N802
        self._note("Check", request, context)
        serving = self.ready and request.service == "veneer.v1.InferenceService"
        state = health_pb2.HealthCheckResponse
        return state(status=state.SERVING if serving else state.NOT_SERVING)
