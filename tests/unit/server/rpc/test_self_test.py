"""The self-test on a real engine with a tiny base, well and with damage planted in memory.

The step loop runs on a thread of this process, so that a test can reach what is resident.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from veneer_proto.v1 import adapters_pb2
from veneer_registry.adapter import AdapterRef, BaseFingerprint, BaseSpec
from veneer_registry.errors import (
    AdapterBudgetExceeded,
    AdapterNotFound,
    InternalError,
    InvalidField,
    QueueFull,
)
from veneer_registry.registry import Registry
from veneer_server.engine import model_runner
from veneer_server.engine.client import EngineClient
from veneer_server.engine.messages import EngineConfig, ToEngine
from veneer_server.lora import references
from veneer_server.lora.table import AdapterTable, GroupViews
from veneer_server.models.config import read_decoder_config
from veneer_server.rpc.adapter_view import source_of
from veneer_server.rpc.self_test import MAX_ADAPTERS, Report, SelfTest
from veneer_server.rpc.verdicts import BOUNDS, Answers, judge
from veneer_server.text.prompts import Prompts

from tests.engine_harness import GREEDY, EngineHarness, engine
from tests.tiny_llama import make_lora, make_tiny_llama
from tests.unit.registry.kit import push

NAMES = ("one", "two", "three")


class LoopThread:
    """In place of `Supervisor`: the engine's loop is a thread, and nothing starts it again."""

    connection, started, healthy = object(), True, True

    def __init__(self, harness: EngineHarness) -> None:
        self.harness = harness

    def write(self, message: ToEngine) -> None:
        self.harness.tell(message)


class Bench:
    """A self-test with its engine and registry in reach."""

    def __init__(
        self, harness: EngineHarness, client: EngineClient, registry: Registry, base: Path
    ) -> None:
        self.harness = harness
        self.client = client
        self.registry = registry
        self.prompts = Prompts(base)
        self.self_test = SelfTest(registry, client, self.prompts, dtype="float32")

    def ref(self, name: str) -> AdapterRef:
        return self.registry.resolve(name)

    @property
    def tables(self) -> dict[str, AdapterTable]:
        return self.harness.memory.tables

    def table(self, name: str) -> AdapterTable:
        return self.tables[self.ref(name).weights_digest]

    async def run(self, *names: str) -> Report:
        return await self.self_test.run(names)

    async def score(self, name: str) -> list[int]:
        """A request to an adapter."""
        adapter = source_of(self.registry, self.registry.get(name))
        outputs = self.client.generate([5, 6], max_tokens=1, sampling=GREEDY, adapter=adapter)
        return [token async for output in outputs for token in output.tokens]

    async def failed(self, *names: str) -> list[str]:
        """Plain names of those that failed; ``base`` for the base."""
        report = await self.run(*names)
        failed = [v.name.partition("@")[0] or "base" for v in report.verdicts if not v.passed]
        assert report.passed == (not failed)
        return failed


def settings(base: Path, **changes: Any) -> EngineConfig:
    options: dict[str, Any] = {
        "quantization": "none",
        "dtype": "float32",
        "kv_cache_bytes": 8 << 20,
    }
    return EngineConfig(
        base_folder=str(base),
        cache_folder=str(base / "cache"),
        base_name="tiny",
        weights_fingerprint="",
        device="cpu",
        **options | changes,
    )


@contextmanager
def pumped(harness: EngineHarness, client: EngineClient) -> Iterator[None]:
    """Hands the engine's messages to the client, in the client's event loop."""
    here = asyncio.get_running_loop()

    def pump() -> None:
        while (message := harness.out.get()) is not None:
            here.call_soon_threadsafe(client.receive, message)

    thread = threading.Thread(target=pump)
    thread.start()
    try:
        yield
    finally:
        harness.out.put(None)  # type: ignore[arg-type]  # the end of this pump
        thread.join()


@asynccontextmanager
async def bench(
    folder: Path, names: Sequence[str] = NAMES, **changes: Any
) -> AsyncIterator[Bench]:
    base = make_tiny_llama(folder / "base")
    decoder = read_decoder_config(base)
    fingerprint = BaseFingerprint("a" * 64, "b" * 64)
    spec = BaseSpec(
        name="tiny",
        num_layers=decoder.num_layers,
        shapes=decoder.shapes,
        fingerprint=fingerprint,
        serving_dtype="float32",
    )
    config = settings(base, **changes)
    with engine(config) as harness, Registry.open(folder / "data", spec) as registry:
        for seed, name in enumerate(names):
            push(registry, name, make_lora(folder / name, seed=seed, rank=2 + 2 * seed))
        client = EngineClient(config, max_queue=8)
        client._supervisor = LoopThread(harness)  # type: ignore[assignment]
        client.info = harness.info
        with pumped(harness, client):
            made = Bench(harness, client, registry, base)
            yield made
            await made.prompts.close()
        assert client.in_flight == 0
        leases = [registry.leases(made.ref(n).weights_digest) for n in names if n in registry]
        assert leases == [0] * len(leases)


# ------------------------------------------------------------------------ all is well


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
        answer = await made.self_test.answer(
            adapters_pb2.SelfTestRequest(adapters=["one", "two"])
        )
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
        alone = await made.run()
        assert [v.name for v in alone.verdicts] == [""]
        assert alone.passed
        assert alone.adapters_mixed == 0
        for name in ("two", "one", "three"):
            await made.run(name)
        report = await made.run()
        assert report.passed
        assert {v.name for v in report.verdicts} == {
            "",
            made.ref("one").short,
            made.ref("three").short,
        }


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


async def test_it_passes_beside_requests_and_leaves_them_alone(tmp_path: Path) -> None:
    """Streams of all adapters run before, during and after it. No choice of theirs is
    closer than 8e-4, and float32 rounds by less than 1e-5, so their tokens must be equal."""
    async with bench(tmp_path) as made:
        began = asyncio.Event()

        async def stream(name: str) -> list[int]:
            tokens = []
            record = made.registry.get(name)
            async for output in made.client.generate(
                [5, 6, 7],
                max_tokens=400,
                sampling=GREEDY,
                adapter=source_of(made.registry, record),
                ignore_eos=True,
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
            made.registry, made.client, made.prompts, dtype="float32", exact=exact
        )
        report = await tested.run(["one", "two"])
        assert report.passed
        assert report.adapters_mixed == mixed


async def test_as_many_as_allowed_share_one_step(tmp_path: Path) -> None:
    names = [f"a{n}" for n in range(MAX_ADAPTERS)]
    async with bench(tmp_path, names) as made:
        report = await made.run(*names)
        assert report.passed
        assert report.adapters_mixed == MAX_ADAPTERS
        with pytest.raises(InvalidField, match="at most 16"):
            await made.run(*names, "one-more")


@pytest.mark.parametrize(("always", "mixed"), [(False, 2), (True, 0)])
async def test_adapters_that_came_too_late_for_the_batch_are_tried_again(
    always: bool, mixed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first time, or every time, they are held back until the base has answered alone."""
    async with bench(tmp_path) as made:
        generate, base_answered = made.client.generate, asyncio.Event()
        left = 2  # the base, and the one that goes before it

        async def late(tokens: Any, *, adapter: Any, **options: Any) -> AsyncIterator[Any]:
            nonlocal left
            if adapter is not None:
                await base_answered.wait()
            async with aclosing(generate(tokens, adapter=adapter, **options)) as outputs:
                async for output in outputs:
                    left -= adapter is None
                    if not left:
                        base_answered.set()
                    yield output
            if always and adapter is not None and not made.client.in_flight:
                left = 2
                base_answered.clear()

        monkeypatch.setattr(made.client, "generate", late)
        report = await made.run("one", "two")
        assert report.passed
        assert report.adapters_mixed == mixed


async def test_tests_take_turns(tmp_path: Path) -> None:
    async with bench(tmp_path, max_running=4) as made:
        # Four places for each, of twelve: beside each other they would not fit.
        reports = await asyncio.gather(*(made.run("one", "two") for _ in range(8)))
        assert all(report.passed for report in reports)


async def test_who_goes_away_takes_nothing_along(tmp_path: Path) -> None:
    """Cancelled at many moments, it holds nothing, and the next one passes."""
    async with bench(tmp_path) as made:
        for turns in range(0, 60, 4):
            task = asyncio.ensure_future(made.run("one", "two"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            assert made.registry.leases(made.ref("one").weights_digest) == 0
        assert (await made.run("one", "two")).passed


async def test_files_are_kept_until_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who goes away while the engine reads an adapter's files must not free them."""
    reading, go_on = threading.Event(), threading.Event()

    def slow(weights: Any, tokens: Any, adapter: Any) -> list[float]:
        if adapter is not None:
            reading.set()
            assert go_on.wait(60)
        return [0.0] * (len(tokens) - 1)

    monkeypatch.setattr(references, "reference_logprobs", slow)
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
            patched.setattr(references, "reference_logprobs", broken)
            with pytest.raises(InternalError, match="MemoryError: no room"):
                await made.run("one")
        assert (await made.run("one")).passed


# ---------------------------------------------------------------------- damage in memory


Damage = Callable[[Bench], None]


def exchange(made: Bench) -> None:
    one, two = made.ref("one").weights_digest, made.ref("two").weights_digest
    made.tables[one], made.tables[two] = made.tables[two], made.tables[one]


def perturb_one_b(made: Bench) -> None:
    """A tenth more, in one of the 21 matrices B."""
    views = made.table("two").views[3][1]
    assert views is not None
    views.expands[0][0].mul_(1.1)


def scale(made: Bench) -> None:
    """A scaling that is half as much again, in every module."""
    table = made.table("one")

    def scaled(views: GroupViews | None) -> GroupViews | None:
        if views is None:
            return None
        return replace(views, expands=tuple((b, 1.5 * by) for b, by in views.expands))

    table.views = tuple(tuple(map(scaled, column)) for column in table.views)


def lose_a_group(made: Bench) -> None:
    table = made.table("three")
    table.views = (table.views[0], (None,) * 3, *table.views[2:])


def not_finite(made: Bench) -> None:
    made.table("two").run.fill_(torch.inf)


@pytest.mark.parametrize(
    ("damage", "wrong"),
    [
        (exchange, ["one", "two"]),
        (perturb_one_b, ["two"]),
        (scale, ["one"]),
        (lose_a_group, ["three"]),
        (not_finite, ["two"]),
    ],
)
async def test_a_damaged_copy_fails_and_no_other(
    damage: Damage, wrong: list[str], tmp_path: Path
) -> None:
    async with bench(tmp_path) as made:
        assert await made.failed(*NAMES) == []
        damage(made)
        assert await made.failed(*NAMES) == wrong
        # The healthy ones pass in any company.
        well = [name for name in NAMES if name not in wrong]
        assert await made.failed(*well) == []


async def test_an_exchange_says_whose_answer_it_is(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.run(*NAMES)
        exchange(made)
        report = await made.run(*NAMES)
        _, one, two, three = report.verdicts
        assert one.max_difference > 1 > one.bound > one.nearest_other
        assert made.ref("two").short in one.detail
        assert made.ref("one").short in two.detail
        assert "evict" in one.detail
        assert three.passed


async def test_adapters_that_are_not_applied_all_answer_as_the_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with bench(tmp_path) as made:
        monkeypatch.setattr(model_runner, "_segments", lambda *_: ())
        report = await made.run(*NAMES)
        assert [v.passed for v in report.verdicts] == [True, False, False, False]
        assert all("the base" in v.detail for v in report.verdicts[1:])


async def test_rows_that_get_their_neighbours_adapter_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A segment that begins a row late, as a wrong row range would."""
    real = model_runner._segments

    def shifted(*args: Any) -> Any:
        return tuple(replace(s, begin=s.begin + 1) for s in real(*args))

    async with bench(tmp_path) as made:
        monkeypatch.setattr(model_runner, "_segments", shifted)
        assert await made.failed(*NAMES) == list(NAMES)


async def test_files_that_are_damaged_fail_and_the_others_are_tested(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        await made.run("one")  # resident; "two" is not
        for name in ("one", "two"):
            file = made.registry.weights_folder(made.ref(name)) / "adapter_model.safetensors"
            file.chmod(0o600)
            data = bytearray(file.read_bytes())
            data[-50] ^= 1
            file.write_bytes(data)
        report = await made.run(*NAMES)
        base, one, two, three = report.verdicts
        assert (base.passed, one.passed, two.passed, three.passed) == (True, False, False, True)
        for verdict in (one, two):
            assert "push the adapter again" in verdict.detail
            assert math.isnan(verdict.max_difference)
        assert report.adapters_mixed == 2  # "one" answers from memory


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
        assert (await made.run()).passed


async def test_a_full_server_refuses_it(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with made.client.places(made.client.capacity - 3), pytest.raises(QueueFull):
            await made.run("one", "two")
        assert (await made.run("one", "two")).passed


async def test_a_server_with_one_place_tests_its_base(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        made.client.capacity = 1
        assert (await made.run()).passed
        with pytest.raises(InvalidField, match="at most 0"):
            await made.run("one")


# ---------------------------------------------------------------------------- judgement


def answers(*served: tuple[str, list[float], list[float]]) -> list[Answers]:
    return [Answers(name, got, wanted) for name, got, wanted in served]


def test_within_the_bound_but_nearer_to_another_is_wrong() -> None:
    """The bound alone would let both pass."""
    given = answers(("", [-5.0], [-5.0]), ("a", [-2.45], [-2.0]), ("b", [-2.3], [-2.6]))
    verdicts = judge(given, 0.5)
    assert [v.passed for v in verdicts] == [True, False, False]
    assert "as b must" in verdicts[1].detail
    assert verdicts[1].nearest_other == pytest.approx(0.15)
    # A bound that is wider than what lies between them cannot tell, and says so.
    verdicts = judge(given, 0.65)
    assert [v.passed for v in verdicts] == [True, True, True]
    assert ["cannot be told" in v.detail for v in verdicts] == [False, True, True]


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf")])
def test_what_is_not_a_number_never_passes(spoiled: float) -> None:
    for got, wanted in (([spoiled, -1.0], [-1.0, -1.0]), ([-1.0, -1.0], [-1.0, spoiled])):
        verdict, _ = judge(answers(("a", got, wanted), ("b", [-9.0] * 2, [-9.0] * 2)), 0.5)
        assert not verdict.passed


def test_a_missing_log_probability_never_passes() -> None:
    (verdict,) = judge(answers(("", [-1.0], [-1.0, -2.0])), 0.5)
    assert not verdict.passed
