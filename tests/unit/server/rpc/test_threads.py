"""Work in threads is never left unfinished."""

from __future__ import annotations

import asyncio
import logging
import threading

import pytest
from veneer_server.serving.spare_time import Background, to_the_end


async def test_results_and_errors_come_back() -> None:
    assert await to_the_end(lambda: 7) == 7

    def fail() -> None:
        raise ValueError("boom")

    # The test's own error.
    with pytest.raises(ValueError, match="boom"):
        await to_the_end(fail)


@pytest.mark.parametrize("fails", [False, True])
async def test_cancelling_waits_for_the_thread_first(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: asyncio.Queue[None] = asyncio.Queue()
    shield = asyncio.shield

    def noted(running: asyncio.Future[None]) -> asyncio.Future[None]:
        waits.put_nowait(None)
        return shield(running)

    monkeypatch.setattr(asyncio, "shield", noted)
    started, go, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        started.set()
        go.wait()
        ended.set()
        if fails:
            raise ValueError("too late to matter")

    task = asyncio.create_task(to_the_end(work))
    await asyncio.to_thread(started.wait)
    await waits.get()
    try:
        for _ in range(2):  # the second cancellation must not cut the wait short
            task.cancel()
            again = asyncio.create_task(waits.get())
            await asyncio.wait({task, again}, return_when=asyncio.FIRST_COMPLETED)
            assert not task.done(), "it waits again"
    finally:
        go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()


async def test_background_runs_one_of_a_kind_and_logs_failures(
    caplog: pytest.LogCaptureFixture,
) -> None:
    background = Background()
    runs: list[int] = []
    go = threading.Event()

    def work() -> None:
        go.wait()
        runs.append(1)
        raise ValueError("boom")

    background.start("sweep", work)
    background.start("sweep", work)
    go.set()
    with caplog.at_level(logging.ERROR):
        await background.finish()
    assert runs == [1]
    assert "background work failed" in caplog.text
    background.start("sweep", work)
    await background.finish()
    assert runs == [1, 1]
