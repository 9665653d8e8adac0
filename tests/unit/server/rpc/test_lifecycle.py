"""Loading, serving, engine failure, draining; health and metrics tell the truth."""

from __future__ import annotations

import asyncio
import contextlib
import os
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from veneer_proto.v1 import inference_pb2, server_pb2
from veneer_registry.errors import StoreLocked
from veneer_server.doors import CannotListen
from veneer_server.rpc.server_service import SERVICES

from tests.refused import refused
from tests.unit.server.rpc.fake_engine import FakeEngine
from tests.unit.server.rpc.front_harness import (
    Front,
    failure,
    make_adapter,
    prompt,
    running,
    until,
)

INFERENCE = SERVICES[0]


async def statuses(front: Front) -> dict[str, str]:
    stub: Any = health_pb2_grpc.HealthStub(front.channel)
    found = {}
    for service in ("", *SERVICES):
        reply = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        found[service] = health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status)
    return found


async def scrape(front: Front) -> dict[str, float]:
    def get() -> str:
        with urllib.request.urlopen(f"http://{front.addresses['metrics']}/metrics") as reply:
            return str(reply.read().decode())

    lines = (await asyncio.to_thread(get)).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


@pytest.fixture
def flags(base_folder: Path, front_cache: Path, tmp_path: Path) -> dict[str, Path]:
    return {"base": base_folder, "cache": front_cache, "data": tmp_path / "server"}


async def test_while_loading_calls_are_refused_and_health_says_so(
    flags: dict[str, Path],
) -> None:
    async with running(**flags, loading=True) as front:
        found = await statuses(front)
        assert found.pop("") == "SERVING"
        assert set(found.values()) == {"NOT_SERVING"}
        failed = await failure(front.inference.Generate(prompt()))
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "MODEL_LOADING")
        assert failed.details["RetryInfo"].retry_delay.seconds == 1
        front.engine.load_gate.set()
        await front.ready.wait()
        assert set((await statuses(front)).values()) == {"SERVING"}
        await front.inference.Generate(prompt())


async def test_a_stop_while_loading_ends_the_server(flags: dict[str, Path]) -> None:
    async with running(**flags, loading=True) as front:
        front.app.stop()
        await front.task
        assert not front.engine.healthy


async def test_an_engine_failure_ends_calls_and_shows_in_health(
    flags: dict[str, Path],
) -> None:
    async with running(**flags) as front:
        front.engine.pace = asyncio.Semaphore(1)
        call = front.inference.GenerateStream(prompt())
        await anext(aiter(call))
        watch = health_pb2_grpc.HealthStub(front.channel).Watch(
            health_pb2.HealthCheckRequest(service=INFERENCE)
        )
        seen: Any = aiter(watch)
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.SERVING
        front.engine.crash()
        failed = await failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_FAILED")
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        found = await statuses(front)
        assert (found[INFERENCE], found[SERVICES[1]]) == ("NOT_SERVING", "SERVING")
        front.engine.set_health(True)
        assert (await anext(seen)).status == health_pb2.HealthCheckResponse.SERVING
        front.engine.pace = None
        await front.inference.Generate(prompt())
        watch.cancel()


async def test_draining_refuses_new_calls_and_finishes_running_ones(
    flags: dict[str, Path],
) -> None:
    async with running(**flags) as front:
        front.engine.pace = pace = asyncio.Semaphore(1)
        call = front.inference.GenerateStream(prompt())
        messages = aiter(call)
        await anext(messages)
        front.app.stop()
        await until(lambda: front.app.phase.value == "draining")
        assert set((await statuses(front)).values()) == {"NOT_SERVING"}
        failed = await failure(front.inference.Generate(prompt()))
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert not front.task.done()
        for _ in range(10):
            pace.release()
        rest = [message async for message in messages]
        assert rest[-1].final.finish_reason == inference_pb2.FINISH_REASON_LENGTH
        await front.task


@pytest.mark.parametrize("idle", [False, True], ids=["one was just answered", "idle before"])
async def test_calls_that_are_on_their_way_as_the_server_stops_are_refused(
    flags: dict[str, Path], idle: bool
) -> None:
    """gRPC hands them over one by one, and would end with CANCELLED those that it still has."""

    async def status(call: Any) -> str:
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return str(error.code().name)
        return "OK"

    async with running(**flags) as front:
        if idle:
            await statuses(front)  # connects
        else:
            await front.inference.Generate(prompt())
        calls = [
            asyncio.ensure_future(status(front.inference.Generate(prompt())))
            for _ in range(100)
        ]
        await asyncio.sleep(0)
        front.app.stop()
        assert set(await asyncio.gather(*calls)) <= {"OK", "UNAVAILABLE"}


async def test_after_the_grace_running_calls_end_with_a_status(flags: dict[str, Path]) -> None:
    async with running(**flags, grace="0") as front:
        front.engine.pace = asyncio.Semaphore(1)
        call = front.inference.GenerateStream(prompt())
        await anext(aiter(call))
        front.app.stop()
        failed = await failure(call)
        assert (failed.code, failed.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert "--grace" in failed.message
        await front.task
        assert front.engine.cancelled == 1


@pytest.mark.push
async def test_what_was_published_is_there_after_a_restart(
    flags: dict[str, Path], tmp_path: Path
) -> None:
    async with running(**flags) as front:
        pushed = (await front.push(make_adapter(tmp_path / "a"), "style")).adapter
    async with running(**flags) as front:
        where = (await front.inference.Generate(prompt(adapter="style"))).provenance
        assert where.revision == pushed.revision


async def test_a_second_server_on_the_data_folder_is_refused(flags: dict[str, Path]) -> None:
    async with running(**flags):
        with refused(StoreLocked, pid=os.getpid()):
            async with running(**flags):
                pass


@pytest.mark.parametrize(("flag", "key"), [("listen", "grpc"), ("metrics_listen", "metrics")])
async def test_a_taken_address_is_named(
    flags: dict[str, Path], tmp_path: Path, flag: str, key: str
) -> None:
    async with running(**flags) as front:
        other = {**flags, "data": tmp_path / "other"}
        with refused(
            CannotListen, flag=f"--{flag.replace('_', '-')}", address=front.addresses[key]
        ):
            async with running(**other, **{flag: front.addresses[key]}):
                pass


async def test_server_info_and_reflection(flags: dict[str, Path]) -> None:
    async with running(**flags, max_queue="7") as front:
        info = await front.server.GetServerInfo(server_pb2.GetServerInfoRequest())
        assert info.version
        assert (info.device, info.backend, info.engine_starts) == ("fake", "fake", 1)
        assert info.base_model.quantization == "nf4"
        assert len(info.base_model.fingerprint.weights) == 64
        assert len(info.base_model.fingerprint.tokenizer) == 64
        assert (info.budgets.max_queue, info.budgets.kv_cache_tokens) == (7, 1000)
        # What the engine found that this machine can do, not what was configured.
        assert (info.budgets.max_batch_tokens, info.budgets.max_prefill_tokens) == (32, 16)
        assert info.longest_step.ToTimedelta().total_seconds() == 2.5
        assert (info.threads, info.why_threads) == (3, "it is fake")
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(front.channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        async for reply in stub.ServerReflectionInfo(iter([request])):
            listed = {service.name for service in reply.list_services_response.service}
        assert {*SERVICES, "grpc.health.v1.Health"} <= listed


async def test_metrics_count_what_happened(flags: dict[str, Path], tmp_path: Path) -> None:
    async with running(**flags) as front:
        await front.push(make_adapter(tmp_path / "a"), "style")
        for adapter in ("style", "style", ""):
            await front.inference.Generate(prompt(adapter=adapter))
        await failure(front.inference.Generate(prompt(adapter="stile")))
        front.engine.pace = asyncio.Semaphore(1)
        call = front.inference.GenerateStream(prompt())
        await anext(aiter(call))
        call.cancel()
        await until(lambda: front.engine.in_flight == 0)
        front.engine.step(seconds=0.02)
        found = await scrape(front)
    expected = {
        'veneer_requests_total{finish_reason="length"}': 3,
        'veneer_requests_total{finish_reason="cancelled"}': 1,
        'veneer_request_failures_total{reason="ADAPTER_NOT_FOUND"}': 1,
        'veneer_adapter_requests_total{adapter_name="style",tenant="default"}': 2,
        'veneer_adapter_cache_lookups_total{result="hit",tier="disk"}': 1,
        'veneer_adapter_cache_lookups_total{result="miss",tier="device"}': 1,
        'veneer_adapter_cache_lookups_total{result="hit",tier="device"}': 1,
        'veneer_time_to_first_token_seconds_count{adapter_tier="none"}': 2,
        'veneer_time_to_first_token_seconds_count{adapter_tier="device"}': 1,
        "veneer_generation_tokens_total": 13,
        "veneer_inter_token_latency_seconds_count": 9,
        "veneer_request_generation_tokens_sum": 13,
        "veneer_e2e_request_latency_seconds_count": 3,
        "veneer_adapters_registered": 1,
        'veneer_adapters_resident{tier="device"}': 1,
        'veneer_adapter_bytes{tier="device"}': 10,
        'veneer_adapter_budget_bytes{tier="host"}': 2 << 30,
        "veneer_num_requests_running": 4,
        "veneer_num_requests_waiting": 3,
        "veneer_kv_cache_usage_ratio": 0.5,
        'veneer_step_seconds_count{phase="decode"}': 1,
        "veneer_step_adapters_sum": 2,
        'grpc_server_handled_total{grpc_code="OK",grpc_method="Generate",'
        'grpc_service="veneer.v1.InferenceService"}': 3,
        'grpc_server_handled_total{grpc_code="NOT_FOUND",grpc_method="Generate",'
        'grpc_service="veneer.v1.InferenceService"}': 1,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert not any("stile" in name for name in found)


async def test_metrics_can_be_off(flags: dict[str, Path]) -> None:
    async with running(**flags, metrics_listen="") as front:
        assert front.addresses["metrics"] == ""
        with contextlib.suppress(KeyError):
            await front.inference.Generate(prompt())


class Telling(FakeEngine):
    """A FAKE engine on a CPU that would gain from inputs of 8 bits."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.info = msgspec.structs.replace(self.info, int8_gain="8 bits would be faster")


async def test_the_ready_line_says_what_inputs_of_8_bits_would_gain(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path / "a", engine=Telling) as front:
        assert front.told[0].endswith("  note: 8 bits would be faster")
    async with running(base_folder, front_cache, tmp_path / "b") as front:
        assert "note:" not in front.told[0]
