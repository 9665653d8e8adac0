"""Refusals of invalid requests, and only these, are delayed, by host, number and size."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import httpx
import pytest
from veneer_proto.v1 import inference_pb2
from veneer_server.queues.refusal_pace import BURST, LONGEST_S, MOST, PIECE, RefusalPace

from tests.unit.server.rpc.front_harness import Front, failure, prompt, running, until

HERE = "10.0.0.1:5000"


class Clock:
    """FAKE: seconds that a test sets."""

    now = 1024.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_is_not_delayed_and_more_is_spaced() -> None:
    pace = RefusalPace(8, clock=Clock())
    assert [pace.charge(HERE) for _ in range(BURST)] == [0.0] * BURST
    assert [pace.charge(HERE) for _ in range(3)] == pytest.approx([1 / 8, 2 / 8, 3 / 8])


def test_a_host_is_charged_whatever_port_it_calls_from_and_no_other_one() -> None:
    pace = RefusalPace(8, clock=Clock())
    for port in range(2 * BURST):
        pace.charge(f"10.0.0.1:{port}")
    assert pace.charge("10.0.0.1:9") > 0
    assert pace.charge("10.0.0.2:9") == 0


def test_a_large_request_counts_for_many() -> None:
    pace = RefusalPace(8, clock=Clock())
    assert pace.charge(HERE, (BURST - 1) * PIECE) == 0
    assert pace.charge(HERE, 4 * PIECE) == pytest.approx(5 / 8)


def test_no_refusal_waits_long_and_all_is_forgotten_in_time() -> None:
    clock = Clock()
    pace = RefusalPace(8, clock=clock)
    for _ in range(1000):
        assert pace.charge(HERE) <= LONGEST_S
    assert pace.charge(HERE) == LONGEST_S
    clock.now += LONGEST_S + BURST / 8
    assert [pace.charge(HERE) for _ in range(BURST)] == [0.0] * BURST


def test_a_rate_of_0_lets_none_wait() -> None:
    pace = RefusalPace(0)
    assert {pace.charge(HERE, 1 << 30) for _ in range(1000)} == {0.0}


async def test_so_many_answers_wait_at_once_and_no_more() -> None:
    pace = RefusalPace(1, clock=Clock())
    pace.charge(HERE, 1 << 30)
    waiting = [asyncio.create_task(pace.wait(HERE)) for _ in range(MOST)]
    await asyncio.sleep(0)
    await pace.wait(HERE)
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    last = asyncio.create_task(pace.wait(HERE))
    await asyncio.sleep(0)
    assert not last.done(), "those who left count no more"
    pace.stop()
    await asyncio.gather(last, pace.wait(HERE))


# ------------------------------------------------------------------- over the wire


def unknown() -> inference_pb2.GenerateRequest:
    return prompt(adapter="no-such")


@pytest.fixture
def delayed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Callers whose refusals are held back, for longer than any test takes."""
    callers: list[str] = []

    def charge(self: RefusalPace, caller: str, size: int = 0) -> float:
        callers.append(caller)
        return 60.0

    monkeypatch.setattr(RefusalPace, "charge", charge)
    return callers


@pytest.mark.asyncio(loop_scope="module")
async def test_an_invalid_call_is_delayed_and_a_valid_one_beside_it_is_not(
    front: Front, delayed: list[str]
) -> None:
    wrong = asyncio.create_task(failure(front.inference.Generate(unknown())))
    await until(lambda: len(delayed) == 1)
    assert (await front.inference.Generate(prompt())).token_ids
    assert not wrong.done()
    wrong.cancel()


@pytest.mark.asyncio(loop_scope="module")
async def test_a_caller_may_leave_while_its_refusal_is_delayed(
    front: Front, delayed: list[str]
) -> None:
    call = front.inference.Generate(unknown(), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert len(delayed) == 1
    assert (await front.inference.Generate(prompt())).token_ids


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/no-such", None),
        ("GET", "/v1/models/no-such", None),
        ("PUT", "/health", None),
        ("POST", "/v1/completions", {"model": "no-such", "prompt": "a"}),
        ("POST", "/v1/completions", {"prompt": 7}),
    ],
)
async def test_over_http_as_well(
    front: Front, delayed: list[str], method: str, path: str, body: object
) -> None:
    base = f"http://{front.addresses['openai']}"
    async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
        wrong = asyncio.create_task(http.request(method, path, json=body))
        await until(lambda: len(delayed) == 1)
        assert (await http.get("/health")).status_code == 200
        assert not wrong.done()
        wrong.cancel()


@pytest.mark.asyncio(loop_scope="module")
async def test_connections_whose_refusals_are_delayed_make_room_for_others(
    base_folder: Path, front_cache: Path, tmp_path: Path, delayed: list[str]
) -> None:
    """They are not idle, and could be all that there may be."""
    flags = {"openai_listen": "127.0.0.1:0", "max_connections": "8"}
    async with running(base_folder, front_cache, tmp_path, **flags) as front:
        base = f"http://{front.addresses['openai']}"
        async with httpx.AsyncClient(base_url=base, trust_env=False) as http:
            wrong = [asyncio.create_task(http.get("/no-such")) for _ in range(8)]
            await until(lambda: len(delayed) == 8)
            assert (await http.get("/health")).status_code == 200
            await until(lambda: sum(task.done() for task in wrong) == 1)
            for task in wrong:
                task.cancel()
            lost = await asyncio.gather(*wrong, return_exceptions=True)
        [closed] = [each for each in lost if isinstance(each, httpx.Response)]
        assert closed.status_code == 429


@pytest.mark.asyncio(loop_scope="module")
async def test_what_is_no_http_waits_and_is_refused(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited = []

    def charge(self: RefusalPace, caller: str, size: int = 0) -> float:
        waited.append(caller)
        return 0.05

    monkeypatch.setattr(RefusalPace, "charge", charge)
    host, port = front.addresses["openai"].rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    for _ in range(3):
        writer.write(b"nonsense\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0)
    answer = await reader.read()
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1
    assert len(waited) == 1
    writer.close()
