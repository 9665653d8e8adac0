"""Uploads are received slowly while sequences run, and as fast as they can otherwise."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from veneer_server.queues import upload_flow
from veneer_server.queues.upload_flow import UploadFlow
from veneer_server.serving.uploads import LONG_S, TURN_S, UploadPace

from tests.fake_clock import in_no_time
from tests.unit.server.rpc.front_harness import make_adapter, prompt, running, until

MIB = 1 << 20


def send(flow: UploadFlow, uploads: int, chunks: int) -> float:
    """Seconds until so many uploads of so many MiB have been received."""

    async def one() -> None:
        for _ in range(chunks):
            await flow.hold(MIB)

    async def all_of_them() -> float:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await asyncio.gather(*(one() for _ in range(uploads)))
        return loop.time() - began

    return in_no_time(all_of_them())


@pytest.mark.parametrize(("uploads", "chunks"), [(1, 64), (8, 8), (64, 1)])
def test_all_together_are_held_to_the_rate_while_sequences_run(
    uploads: int, chunks: int
) -> None:
    assert send(UploadFlow(lambda: True, rate=8 * MIB), uploads, chunks) == pytest.approx(8.0)


def test_the_rate_goes_by_the_cores_that_a_container_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the machine's 64 a container of 2 would hardly have held any back."""
    monkeypatch.setattr(upload_flow, "usable_cores", lambda: 2)
    assert send(UploadFlow(lambda: True), 1, 64) == pytest.approx(4.0)


def test_none_is_held_while_nothing_runs() -> None:
    assert send(UploadFlow(lambda: False, rate=1.0), 8, 8) == 0.0


def test_uploads_go_on_at_once_when_the_last_sequence_ends() -> None:
    async def work() -> float:
        loop = asyncio.get_running_loop()
        flow = UploadFlow(lambda: loop.time() < 2.0, rate=MIB)
        await asyncio.gather(*(flow.hold(100 * MIB) for _ in range(4)))
        return loop.time()

    assert in_no_time(work()) == pytest.approx(2.0, abs=0.1)


def test_a_pause_between_uploads_is_not_saved_up() -> None:
    async def work() -> float:
        flow = UploadFlow(lambda: True, rate=MIB)
        await flow.hold(MIB)
        await asyncio.sleep(100)
        return await flow.hold(4 * MIB)

    assert in_no_time(work()) == pytest.approx(4.0)


def test_being_held_back_is_not_held_against_an_upload() -> None:
    """It would have lost its place to another upload as one that has long to go."""

    async def work() -> tuple[float, float]:
        pace, flow = UploadPace(1), UploadFlow(lambda: True, rate=MIB)
        for _ in range(100):
            await pace.wait(lambda: asyncio.sleep(1.0))
            pace.progressed(MIB, 400 * MIB)
            pace.held(await flow.hold(10 * MIB))
        left: list[float] = []

        async def look() -> None:
            left.append(pace.remaining_s)

        await pace.wait(look)
        return asyncio.get_running_loop().time(), left[0]

    took, left = in_no_time(work())
    assert took == pytest.approx(1000, rel=0.1)
    assert took > TURN_S
    assert left == pytest.approx(400, rel=0.1)
    assert left < LONG_S


async def test_an_upload_beside_a_stream_waits_for_it(
    base_folder: Path, front_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one byte a second it is received only when the stream has ended."""
    monkeypatch.setattr(upload_flow, "BYTES_A_SECOND", 1)
    held, hold = asyncio.Event(), UploadFlow.hold

    async def noted(flow: UploadFlow, count: int) -> float:
        held.set()
        return await hold(flow, count)

    monkeypatch.setattr(UploadFlow, "hold", noted)
    adapter = make_adapter(tmp_path / "adapter")
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        front.engine.pace = asyncio.Semaphore(0)
        stream = asyncio.ensure_future(front.inference.Generate(prompt()))
        await until(lambda: front.engine.in_flight == 1)
        uploading = asyncio.ensure_future(front.push(adapter, "mine"))
        await held.wait()
        assert not uploading.done()
        for _ in range(4):
            front.engine.pace.release()
        await stream
        assert (await uploading).published
