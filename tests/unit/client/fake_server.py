"""A FAKE server for client tests: the contract on a real socket, without a model.

Answers are functions of the request. The errors in `refusals` come first, one per call. `calls`
records every call, `actors` who made it. It can `restart` on its port; its attributes survive,
like a disk.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from veneer_proto.v1 import (
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    server_pb2,
    server_pb2_grpc,
)

from tests.unit.client.fake_adapters import FakeAdapters
from tests.unit.client.refusals import Refusal

__all__ = ["FakeServer", "Refusal"]

SERVICES = (
    "veneer.v1.InferenceService",
    "veneer.v1.AdapterService",
    "veneer.v1.ServerService",
    "grpc.health.v1.Health",
    reflection.SERVICE_NAME,
)


class FakeServer(
    inference_pb2_grpc.InferenceServiceServicer,
    FakeAdapters,
    server_pb2_grpc.ServerServiceServicer,
    health_pb2_grpc.HealthServicer,
):
    """See the module docstring; use it in a ``with``."""

    def __init__(self) -> None:
        FakeAdapters.__init__(self)
        self.calls: list[tuple[str, Any]] = []
        self.actors: list[str] = []
        self.refusals: deque[Refusal] = deque()
        # For streams: if set, the server waits for this event after the first pieces.
        self.hold: threading.Event | None = None
        self.cancelled = threading.Event()
        self.begun = threading.Event()
        """Set when a call has reached `hold`."""
        self.break_after: Refusal | None = None
        self.omit_end = False
        self.pieces: list[inference_pb2.GenerateStreamResponse] = []
        """If set, the messages of every stream."""
        self.on_generate: Callable[[Any], Any] | None = None
        self._pool = ThreadPoolExecutor(8)
        self.ready = True
        self.registry = False
        """Whether it answers health checks as a server that generates nothing does."""
        self.address = "127.0.0.1:0"
        self._server = self._listen()

    def _listen(self) -> grpc.Server:
        made = grpc.server(self._pool)
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self, made)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self, made)
        server_pb2_grpc.add_ServerServiceServicer_to_server(self, made)
        health_pb2_grpc.add_HealthServicer_to_server(self, made)
        reflection.enable_server_reflection(SERVICES, made)
        self.address = f"127.0.0.1:{made.add_insecure_port(self.address)}"
        return made

    def __enter__(self) -> FakeServer:
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.hold is not None:
            self.hold.set()
        self.stop()
        self._pool.shutdown()

    def stop(self) -> None:
        """End all calls and connections, and stop listening."""
        self._server.stop(None).wait()

    def close(self) -> None:
        """`stop` from inside a call, which it ends; returns at once."""
        self._server.stop(None)

    def start(self) -> None:
        """Listen again, at the same address."""
        self._server = self._listen()
        self._server.start()

    def restart(self) -> None:
        """Restart, which ends all calls and connections; works from inside a call, too."""
        before = self._server
        self.start()  # first, so that a client that reconnects at once is answered
        before.stop(None)

    def count(self, method: str) -> int:
        """Calls of a method so far."""
        return sum(name == method for name, _ in self.calls)

    def note(self, method: str, request: Any, context: grpc.ServicerContext) -> None:
        self.calls.append((method, request))
        self.actors += [str(v) for k, v in context.invocation_metadata() if k == "veneer-actor"]
        if self.refusals:
            self.refusals.popleft().end(context)

    # ------------------------------------------------------------------- inference

    def Generate(self, request, context):  # noqa: N802
        self.note("Generate", request, context)
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
            provenance=self.provenance(request.adapter),
        )

    def GenerateStream(self, request, context):  # noqa: N802
        self.note("GenerateStream", request, context)
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
                provenance=self.provenance(request.adapter),
            ),
        )

    def provenance(self, adapter: str) -> inference_pb2.Provenance:
        made = inference_pb2.Provenance(base_model="fake-base", adapter=adapter)
        if adapter:
            made.revision, made.weights_digest, made.tier = "ab" * 32, "cd" * 32, self.tier
        made.timings.queue.FromMilliseconds(2)
        made.timings.adapter_load.FromMilliseconds(41)
        made.timings.time_to_first_token.FromMilliseconds(88)
        made.timings.total.FromMilliseconds(188)
        return made

    # ---------------------------------------------------------------------- server

    def GetServerInfo(self, request, context):  # noqa: N802
        self.note("GetServerInfo", request, context)
        return server_pb2.GetServerInfoResponse(
            version="9.9",
            base_model=server_pb2.BaseModel(name="fake-base", quantization="nf4"),
            device="cpu",
            backend="fake",
            context_length=128,
            engine_starts=1,
            admin_port=True,
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

    def GetUsage(self, request, context):  # noqa: N802
        self.note("GetUsage", request, context)
        return server_pb2.GetUsageResponse(
            tenants=[
                server_pb2.TenantUsage(
                    tenant=request.tenant or "default",
                    requests=1234,
                    prompt_tokens=5,
                    cached_prompt_tokens=4,
                    generated_tokens=3,
                    adapter_byte_hours=1.5 * (1 << 30),
                )
            ],
            start=request.start,
            end=request.end,
        )

    def PlanCapacity(self, request, context):  # noqa: N802
        self.note("PlanCapacity", request, context)
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
        self.note("Check", request, context)
        if self.registry and request.service == "veneer.v1.InferenceService":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such service")
        service = "AdapterService" if self.registry else "InferenceService"
        serving = self.ready and request.service == f"veneer.v1.{service}"
        state = health_pb2.HealthCheckResponse
        return state(status=state.SERVING if serving else state.NOT_SERVING)
