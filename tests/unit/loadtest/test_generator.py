"""The load generator's worker processes against a fake server that is a process, too."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from veneer_client import AsyncClient
from veneer_loadtest.errors import TargetFailed
from veneer_loadtest.load.generator import LoadOutcome, generate
from veneer_loadtest.load.plan import plan
from veneer_loadtest.load.records import Record, pack_gaps
from veneer_loadtest.load.session import worker_count
from veneer_loadtest.load.spec import (
    AdapterMix,
    Arrivals,
    Closed,
    Lengths,
    LoadSpec,
    Open,
    Traced,
)
from veneer_loadtest.load.targets import OpenAiSpec, TargetSpec, VeneerSpec, make_target
from veneer_loadtest.load.wire import WorkerSetup
from veneer_loadtest.load.worker import WorkerShare
from veneer_loadtest.report import usable_cores
from veneer_loadtest.setup import remove

from tests.fakes.fast_target import FastTarget
from tests.ports import free_port
from tests.refused import refused

TOKENS = 3


def load(arrivals: Arrivals, **more: object) -> LoadSpec:
    return LoadSpec(
        **{  # type: ignore[arg-type]
            "adapters": ("a", "b"),
            "arrivals": arrivals,
            "popularity": AdapterMix("roundrobin"),
            "prompt_tokens": Lengths(5, 9),
            "tokens": Lengths(TOKENS, TOKENS),
            "duration_s": 0.0,
            "warmup_s": 0.0,
            "requests": 0,
            "cancel_share": 0.0,
            "seed": 1,
            "vocab": 5000,
            **more,
        }
    )


async def send(
    spec: LoadSpec,
    target: TargetSpec,
    *,
    workers: int = 1,
    timeout_s: float = 60.0,
    stop: asyncio.Event | None = None,
    on_progress: object = lambda loaded: None,
) -> LoadOutcome:
    return await generate(
        spec,
        target,
        workers=workers,
        timeout_s=timeout_s,
        stop=stop or asyncio.Event(),
        on_progress=on_progress,  # type: ignore[arg-type]
    )


@pytest.fixture
def server() -> Iterator[FastTarget]:
    with FastTarget() as target:
        yield target


@pytest.fixture
def stalled() -> Iterator[FastTarget]:
    """Answers nobody for the first minute."""
    with FastTarget(stall="0:60") as target:
        yield target


@pytest.mark.parametrize("api", ["grpc", "http"])
async def test_no_request_and_no_token_is_lost(api: str) -> None:
    spec = load(Open(400.0), requests=600)
    with FastTarget() as server:
        target: TargetSpec = VeneerSpec(server.grpc)
        if api == "http":
            target = OpenAiSpec(f"http://{server.http}")
        loaded = await send(spec, target, workers=3)
    records = loaded.records
    assert loaded.lost == 0
    assert sorted(r.index for r in records) == list(range(600))
    assert Counter((r.outcome, r.reason) for r in records) == {("ok", ""): 600}
    assert server.counts == {
        "requests": 600,
        "tokens": sum(r.tokens for r in records),
        "prompt_tokens": sum(r.prompt_tokens for r in records),
    }
    assert Counter(r.adapter for r in records) == {"a": 300, "b": 300}
    assert set(loaded.sent) == {0, 1, 2}
    # Due when the load says, whenever it was sent.
    assert {r.index: r.due_s for r in records} == {p.index: p.at_s for p in plan(spec)}
    for record in records:
        assert record.first_s is not None
        assert record.due_s <= record.sent_s <= record.first_s <= record.end_s
        assert len(record.gap_values()) == TOKENS - 1
        arrivals = list(record.arrivals_s())
        assert len(arrivals) == record.tokens
        assert arrivals[-1] <= record.end_s + 1e-5  # gaps are 32-bit floats


async def test_latency_counts_from_when_a_request_was_due() -> None:
    """A server that stalls is seen by all that were due meanwhile, not by those few that
    a closed loop would have had under way (coordinated omission)."""
    stall_s = 1.0
    with FastTarget(stall=f"0:{stall_s}") as server:
        loaded = await send(load(Open(50.0, cv=0.0), requests=60), VeneerSpec(server.grpc))
    stall_end = min(r.due_s for r in loaded.records) + stall_s
    within = [r for r in loaded.records if r.due_s < stall_end]
    assert len(within) >= 50, "the generator goes on sending"
    for record in within:
        assert record.first_token_s is not None
        # Lower bounds: a slow machine only adds. 1 ms: clocks of two processes.
        assert record.first_token_s >= stall_end - record.due_s - 1e-3


def test_a_generator_that_is_late_adds_to_the_latency() -> None:
    record = Record(
        index=0,
        adapter="",
        due_s=1.0,
        sent_s=1.5,
        first_s=1.6,
        end_s=2.0,
        prompt_tokens=1,
        cached=0,
        tokens=2,
        outcome="ok",
        gaps=pack_gaps([1.6, 1.9]),
    )
    assert record.first_token_s == pytest.approx(0.6)
    assert record.whole_s == pytest.approx(1.0)
    assert list(record.gap_values()) == pytest.approx([0.3])


async def test_closed_loop_keeps_its_streams_busy_and_no_more(stalled: FastTarget) -> None:
    stop = asyncio.Event()

    def stop_when_all_are_sent(loaded: LoadOutcome) -> None:
        if sum(loaded.sent.values()) >= 5:
            stop.set()

    loaded = await send(
        load(Closed(5)),
        VeneerSpec(stalled.grpc),
        workers=2,
        stop=stop,
        on_progress=stop_when_all_are_sent,
    )
    assert Counter(r.outcome for r in loaded.records) == {"stopped": 5}
    assert loaded.stopped
    assert loaded.lost == 0


async def test_a_stop_does_not_wait_for_the_next_request(server: FastTarget) -> None:
    stop = asyncio.Event()
    stop.set()
    hours_between = Open(1 / 36_000, cv=0.0)
    loaded = await send(load(hours_between), VeneerSpec(server.grpc), stop=stop)
    assert loaded.stopped
    assert loaded.records == []


async def test_a_request_that_is_stopped_before_its_first_line_is_told() -> None:
    spec, nobody = load(Open(1.0), requests=1), VeneerSpec("127.0.0.1:1")
    async with make_target(spec, nobody) as target:
        share = WorkerShare(WorkerSetup(spec, nobody, 0, 1, 60.0), target)
        task = share.begin(next(plan(spec)), 0.0)
        share.stop()
        await asyncio.wait((task,))
    assert [(r.index, r.outcome) for r in share.take()] == [(0, "stopped")]


async def test_closed_loop_of_so_many_requests(server: FastTarget) -> None:
    loaded = await send(load(Closed(4), requests=50), VeneerSpec(server.grpc), workers=8)
    assert sorted(r.index for r in loaded.records) == list(range(50))
    assert set(loaded.sent) == {0, 1, 2, 3}, "a worker without a stream is none"
    # In each lane, one after the other.
    assert all(r.outcome == "ok" for r in loaded.records)


def test_a_fast_trace_gets_the_workers_that_it_needs(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = ({"at_s": i / 1000, "tokens": 1, "prompt_tokens": 1} for i in range(5000))
    trace.write_text("\n".join(json.dumps(line) for line in lines))
    cores = usable_cores()
    assert worker_count(0, load(Traced(str(trace), 2.0))) == min(7, cores)
    assert worker_count(0, load(Open(100.0))) == 1
    assert worker_count(0, load(Open(500.0))) == min(2, cores)
    assert worker_count(5, load(Open(1.0))) == 5


async def test_callers_that_leave(server: FastTarget) -> None:
    spec = load(Open(200.0), requests=200, cancel_share=0.5, tokens=Lengths(8, 8))
    loaded = await send(spec, VeneerSpec(server.grpc))
    left = [r for r in loaded.records if r.outcome == "left"]
    assert 60 <= len(left) <= 140  # 100 +- 5.7 standard deviations
    assert {r.tokens for r in left} == set(range(8))
    assert all(r.tokens == 8 for r in loaded.records if r.outcome == "ok")
    assert loaded.lost == 0


async def test_timeouts_are_failures(stalled: FastTarget) -> None:
    loaded = await send(load(Open(50.0), requests=10), VeneerSpec(stalled.grpc), timeout_s=0.2)
    assert Counter((r.outcome, r.reason) for r in loaded.records) == {("failed", "TIMEOUT"): 10}


async def test_errors_have_the_servers_own_reason(server: FastTarget) -> None:
    loaded = await send(
        load(Open(50.0), requests=10, adapters=("nobody", "a")),
        OpenAiSpec(f"http://{server.http}"),
    )
    assert Counter((r.adapter, r.outcome, r.reason) for r in loaded.records) == {
        ("nobody", "failed", "model_not_found"): 5,
        ("a", "ok", ""): 5,
    }


@pytest.mark.parametrize("target", [VeneerSpec, lambda at: OpenAiSpec(f"http://{at}")])
async def test_nobody_there(target: type[VeneerSpec]) -> None:
    address = f"127.0.0.1:{free_port()}"
    with refused(TargetFailed) as caught:
        await send(load(Open(1.0), requests=1), target(address))
    assert caught.value.metadata["address"].removeprefix("http://") == address


async def test_a_server_that_dies_is_a_figure() -> None:
    with FastTarget() as server:

        def kill(loaded: LoadOutcome) -> None:
            if len(loaded.records) > 20:
                server.kill()

        spec = load(Open(100.0), requests=200)
        loaded = await send(spec, VeneerSpec(server.grpc), on_progress=kill)
    assert loaded.lost == 0
    assert sorted(r.index for r in loaded.records) == list(range(200))
    told = Counter((r.outcome, r.reason) for r in loaded.records)
    assert told["ok", ""] > 20
    assert told["failed", "SERVER_UNREACHABLE"] > 0
    assert sum(told.values()) == 200


async def test_what_could_not_be_deleted_is_told_and_no_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with AsyncClient(f"127.0.0.1:{free_port()}", timeout_s=5.0) as client:
        await remove(client, "load-0")
    assert "could not delete load-0" in capsys.readouterr().err


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "veneer_loadtest.load.worker" in process.cmdline()
    except psutil.Error:  # some other child, which has ended
        return False


async def test_what_a_worker_told_before_it_died_is_kept(server: FastTarget) -> None:
    killed: list[int] = []

    def kill_one(loaded: LoadOutcome) -> None:
        if not killed and len(loaded.records) > 20:
            children = psutil.Process().children(recursive=True)
            next(filter(_is_worker, children)).kill()
            killed.append(len(loaded.records))

    loaded = await send(
        load(Open(200.0), duration_s=30.0),
        VeneerSpec(server.grpc),
        workers=2,
        on_progress=kill_one,
    )
    assert "status -9" in loaded.failure
    assert loaded.stopped, "the rest of the load means nothing without its share"
    assert len(loaded.records) >= killed[0]
    assert {r.outcome for r in loaded.records} <= {"ok", "stopped"}
