"""The self-test of a healthy server, beside other requests, and what it refuses."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterNotFound,
    InternalError,
    InvalidField,
    QueueFull,
)
from veneer_server.adapters import references
from veneer_server.engine_client.places import Place
from veneer_server.rpc.convert import self_test_response
from veneer_server.serving.events import source_of
from veneer_server.serving.self_test import BOUNDS, MAX_ADAPTERS, MAX_WAITING, SelfTest
from veneer_server.wire.messages import SequenceRequest

from tests.engine_harness import GREEDY
from tests.refused import refused
from tests.unit.registry.kit import push
from tests.unit.server.rpc.cancelling import Cancelled
from tests.unit.server.rpc.self_test_kit import NAMES, bench


async def test_a_healthy_server_passes_with_all_in_one_batch(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        report = await made.run(*NAMES)
        assert report.passed
        assert report.adapters_mixed == 3
        assert [v.name for v in report.verdicts] == ["", *(made.ref(n).short for n in NAMES)]
        for verdict in report.verdicts:
            # float32 on both sides: rounding alone is left.
            assert 0 < verdict.max_difference < 1e-4 < verdict.bound == BOUNDS["float32"]
            assert verdict.nearest_other > 1
            assert verdict.detail == ""


async def test_the_wire_says_the_same(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        answer = self_test_response(await made.run("one", "two"))
    assert answer.passed
    assert answer.adapters_mixed == 2
    assert [r.adapter.partition("@")[0] for r in answer.results] == ["", "one", "two"]
    for result in answer.results:
        assert result.passed
        assert result.max_difference < result.bound < result.nearest_other


async def test_adapters_are_loaded_and_may_be_named_in_every_way(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        ref = made.ref("one")
        assert not made.tables
        report = await made.run("one", f"one@{ref.revision[:12]}", "two")
        assert report.passed
        assert [v.name for v in report.verdicts] == ["", ref.short, made.ref("two").short]
        assert len(made.tables) == 2


async def test_without_names_the_two_used_last_are_tested(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        for name in ("two", "one", "three"):
            await made.run(name)
        report = await made.run()
        assert report.passed
        assert {v.name for v in report.verdicts} == {
            "",
            made.ref("one").short,
            made.ref("three").short,
        }


async def test_after_an_evict_adapters_are_still_tested(tmp_path: Path) -> None:
    """Nothing is in memory: those asked for last are loaded."""
    async with bench(tmp_path) as made:
        await made.score("two")
        made.use.touch(made.ref("two"))
        digest = made.ref("two").weights_digest
        await made.client.evict(digest, mode="drain", unpin=False)
        assert not made.tables
        report = await made.run()
        assert report.passed
        assert report.note == ""
        tested = [v.name for v in report.verdicts]
        assert tested == ["", made.ref("two").short, made.ref("one").short]


async def test_a_server_without_adapters_says_that_it_tested_the_base_alone(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path, ()) as made:
        answer = self_test_response(await made.run())
        assert answer.passed
        assert [result.adapter for result in answer.results] == [""]
        assert "no adapters are registered" in answer.note


async def test_adapters_of_which_none_can_be_tested_are_no_pass(tmp_path: Path) -> None:
    """The base is right; nothing is known of the adapters, and the note says why."""
    async with bench(tmp_path, device_adapter_bytes=1000, host_adapter_bytes=1000) as made:
        answer = self_test_response(await made.run())
        assert [(r.adapter, r.passed) for r in answer.results] == [("", True)]
        assert not answer.passed
        assert "none of 3 adapters could be tested" in answer.note


async def test_one_that_cannot_be_loaded_does_not_keep_the_others_from_it(
    tmp_path: Path,
) -> None:
    """The third adapter, which was asked for last, is larger than the budget."""
    async with bench(tmp_path) as made:
        room = made.registry.get("two").manifest.serving_bytes
    budget = {"device_adapter_bytes": room, "host_adapter_bytes": room}
    async with bench(tmp_path / "again", **budget) as made:
        made.use.touch(made.ref("three"))
        report = await made.run()
        assert report.passed
        assert made.ref("three").short not in [v.name for v in report.verdicts]
        assert report.adapters_tested == 2


async def test_names_that_mean_the_same_weights_cannot_be_told_apart(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        push(made.registry, "twin", tmp_path / "one")
        report = await made.run("one", "twin", "two")
        assert report.passed
        base, one, twin, two = report.verdicts
        assert made.ref("twin").short in one.detail
        assert made.ref("one").short in twin.detail
        assert one.nearest_other == one.max_difference
        assert (base.detail, two.detail) == ("", "")


@pytest.mark.push
async def test_it_passes_beside_requests_and_leaves_them_alone(tmp_path: Path) -> None:
    """Streams of all adapters run before, during and after it. No choice of theirs is
    closer than 8e-4, and float32 rounds by less than 1e-5, so their tokens must be equal."""
    async with bench(tmp_path) as made:
        began = asyncio.Event()

        async def stream(name: str) -> list[int]:
            tokens = []
            record = made.registry.get(name)
            async for output in made.client.generate(
                SequenceRequest(
                    [5, 6, 7],
                    max_tokens=400,
                    sampling=GREEDY,
                    adapter=source_of(made.registry, record),
                    ignore_eos=True,
                )
            ):
                tokens += output.tokens
                began.set()
            return tokens

        alone = await asyncio.gather(*map(stream, NAMES))
        began.clear()
        streams = [asyncio.ensure_future(stream(name)) for name in NAMES]
        await began.wait()
        report = await made.run(*NAMES)
        assert not any(task.done() for task in streams), "they were beside it to its end"
        assert report.passed
        assert report.adapters_mixed == 3
        assert await asyncio.gather(*streams) == alone


@pytest.mark.parametrize(("exact", "mixed"), [(False, 2), (True, 0)])
async def test_exact_mode_mixes_none(exact: bool, mixed: int, tmp_path: Path) -> None:
    async with bench(tmp_path, exact=exact) as made:
        tested = SelfTest(
            made.registry, made.client, made.prompts, made.use, dtype="float32", exact=exact
        )
        report = await tested.run(["one", "two"])
        assert report.passed
        assert report.adapters_mixed == mixed


async def test_as_many_as_allowed_are_mixed(tmp_path: Path) -> None:
    names = [f"a{n}" for n in range(MAX_ADAPTERS)]
    async with bench(tmp_path, names) as made:
        # Beside a base as small as this one any adapter is large.
        scheduler = made.harness.scheduler
        scheduler.limits = replace(scheduler.limits, base_parameters=0)
        report = await made.run(*names)
        assert report.passed
        assert report.adapters_mixed == MAX_ADAPTERS
        with refused(InvalidField, field="adapters", limit=16):
            await made.run(*names, "one-more")


async def test_adapters_that_came_too_late_for_the_batch_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time they are held back until the base has answered alone."""
    async with bench(tmp_path) as made:
        generate, base_answered = made.client.generate, asyncio.Event()
        left = 2  # the base, and the one that goes before it

        async def late(request: SequenceRequest, place: Place) -> AsyncIterator[Any]:
            nonlocal left
            if request.adapter is not None:
                await base_answered.wait()
            async with aclosing(generate(request, place)) as outputs:
                async for output in outputs:
                    left -= request.adapter is None
                    if not left:
                        base_answered.set()
                    yield output

        monkeypatch.setattr(made.client, "generate", late)
        report = await made.run("one", "two")
        assert report.passed
        assert report.adapters_mixed == 2


async def test_what_was_not_mixed_is_not_called_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence at a time, however often it is tried."""
    async with bench(tmp_path) as made:
        generate, alone = made.client.generate, asyncio.Lock()

        async def one_by_one(tokens: Any, **options: Any) -> AsyncIterator[Any]:
            async with alone, aclosing(generate(tokens, **options)) as outputs:
                async for output in outputs:
                    yield output

        monkeypatch.setattr(made.client, "generate", one_by_one)
        report = await made.run("one", "two")
        assert report.passed
        assert report.adapters_mixed == 0


async def test_tests_take_turns(tmp_path: Path) -> None:
    async with bench(tmp_path, max_running=4) as made:
        # Four places for each, of twelve: beside each other they would not fit.
        tests = [made.run("one", "two") for _ in range(1 + MAX_WAITING)]
        reports = await asyncio.gather(*tests)
        assert all(report.passed for report in reports)


async def test_who_goes_away_takes_nothing_along(tmp_path: Path) -> None:
    """Cancelled wherever it waits, it holds nothing, and the next one passes."""
    async with bench(tmp_path) as made:
        for wait, later in itertools.product(range(20), (0, 9)):
            work = Cancelled(made.run("one", "two"), wait, later=later)

            async def run(work: Cancelled = work) -> Any:
                return await work

            task = asyncio.ensure_future(run())
            await asyncio.wait([task])
            assert made.registry.leases(made.ref("one").weights_digest) == 0
            assert made.client.in_flight == 0
            if not work.reached:
                break
            assert task.cancelled() or later
        assert wait > 2
        assert (await made.run("one", "two")).passed


async def test_files_are_kept_until_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who goes away while the engine reads an adapter's files must not free them."""
    reading, go_on = threading.Event(), threading.Event()

    def slow(weights: Any, tokens: Any, adapters: Any) -> list[list[float]]:
        if any(adapters):
            reading.set()
            assert go_on.wait(60)
        return [[0.0] * (len(tokens) - 1) for _ in adapters]

    monkeypatch.setattr(references, "references", slow)
    async with bench(tmp_path) as made:
        digest = made.ref("one").weights_digest
        task = asyncio.ensure_future(made.run("one"))
        assert await asyncio.to_thread(reading.wait, 60)
        # Steps and loads go on meanwhile.
        await asyncio.wait_for(made.score("two"), 30)
        task.cancel()
        done, _ = await asyncio.wait([task], timeout=0)
        assert not done
        assert made.registry.leases(digest) == 1
        go_on.set()
        await asyncio.wait([task])
        assert task.cancelled()
        assert made.registry.leases(digest) == 0


async def test_a_reference_that_breaks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine and its worker live on, and the next test has its references."""

    def broken(*args: Any) -> Any:
        raise MemoryError("no room")

    async with bench(tmp_path) as made:
        with monkeypatch.context() as patched:
            patched.setattr(references, "references", broken)
            with refused(InternalError, error="MemoryError"):
                await made.run("one")
        assert (await made.run("one")).passed


# ----------------------------------------------------------------------------- refusals


async def test_an_unknown_name_is_refused_and_no_lease_is_left(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with pytest.raises(AdapterNotFound):
            await made.run("one", "no-such-adapter")
        assert made.registry.leases(made.ref("one").weights_digest) == 0


async def test_an_adapter_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    async with bench(tmp_path, device_adapter_bytes=1000, host_adapter_bytes=1000) as made:
        with pytest.raises(AdapterBudgetExceeded):
            await made.run("one")
        assert made.client.in_flight == 0


async def test_a_full_server_refuses_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        places = made.client.places
        most = places.capacity - 3
        with places.hold(most, at_once=most), pytest.raises(QueueFull):
            await made.run("one", "two")
        assert (await made.run("one", "two")).passed


async def test_a_server_with_one_place_tests_its_base_and_says_so(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.client.places.capacity = 1
        report = await made.run()
        assert [(v.name, v.passed) for v in report.verdicts] == [("", True)]
        assert not report.passed
        assert "--max-running" in report.note
        with refused(InvalidField, field="adapters", limit=0):
            await made.run("one")
