"""The self-test of the real server, on the real base with the example adapters."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from veneer_proto.v1 import adapters_pb2
from veneer_server.serving.self_test import BOUNDS, PROBE, ProbeAnswers, Verdict, judge
from veneer_server.step.adapter_table import GroupViews
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import EngineConfig, OperationDone, Reference

from tests.engine_harness import EngineHarness, engine, source
from tests.places import REPOSITORY
from tests.server_harness import Server, Stream, running_server

pytestmark = [pytest.mark.push, pytest.mark.real_base]

EXAMPLES = {name: REPOSITORY / "examples" / "adapters" / name for name in ("chat", "code")}


# -------------------------------------------------------------------- over the wire


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def serving(
    base_folder: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Server]:
    """A server of its own, as it starts by default (4 bits, bfloat16), with both examples."""
    folder = tmp_path_factory.mktemp("self-test") / "data"
    async with running_server(folder, cache_dir) as server:
        for name, path in EXAMPLES.items():
            await server.push(path, name)
        yield server


async def self_test(server: Server, *names: str) -> adapters_pb2.SelfTestResponse:
    answer: adapters_pb2.SelfTestResponse = await server.adapters.SelfTest(
        adapters_pb2.SelfTestRequest(adapters=names)
    )
    return answer


@pytest.mark.asyncio(loop_scope="module")
async def test_both_examples_and_the_base_pass_in_one_batch(serving: Server) -> None:
    """Each is far from the others and within the bound of itself."""
    answer = await self_test(serving, "chat", "code")
    assert answer.passed, answer
    assert answer.adapters_mixed == 2
    assert [r.adapter.partition("@")[0] for r in answer.results] == ["", "chat", "code"]
    for result in answer.results:
        assert result.passed
        assert 0 < result.max_difference < result.bound < result.nearest_other
    # Without names: the two that were used last, which are these.
    again = await self_test(serving)
    assert again.passed
    assert {r.adapter for r in again.results} == {r.adapter for r in answer.results}


@pytest.mark.asyncio(loop_scope="module")
async def test_streams_go_on_beside_it(serving: Server) -> None:
    """Two streams with adapters begin before it, get tokens meanwhile, and outlast it."""
    counts = dict.fromkeys(EXAMPLES, 0)

    async def follow(name: str, stream: Stream) -> None:
        await stream.first()
        begun.release()
        while True:
            await stream.first()
            counts[name] += 1

    begun = asyncio.Semaphore(0)
    stopping = {"max_tokens": 4000, "ignore_eos": True}
    streams = {
        name: serving.stream(prompt="Once upon a time", adapter=name, stopping=stopping)
        for name in EXAMPLES
    }
    following = [asyncio.ensure_future(follow(*item)) for item in streams.items()]
    for _ in streams:
        await begun.acquire()
    before = dict(counts)
    answer = await self_test(serving, "chat", "code")
    assert not any(task.done() for task in following), "a stream ended"
    assert all(counts[name] > before[name] for name in counts)
    assert answer.passed, answer
    assert answer.adapters_mixed == 2
    for task, stream in zip(following, streams.values(), strict=True):
        task.cancel()
        stream.call.cancel()
    await asyncio.wait(following)


@pytest.mark.asyncio(loop_scope="module")
async def test_an_unknown_adapter_is_not_found(serving: Server) -> None:
    request = adapters_pb2.SelfTestRequest(adapters=["chat", "chatt"])
    refused = await serving.refused(serving.adapters.SelfTest(request))
    assert (refused.code, refused.reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert refused.metadata["did_you_mean"] == "chat"


# ----------------------------------------------------------- damage in the real engine


class Bench:
    """Serves the probe for base and examples in one batch, and judges it."""

    def __init__(self, harness: EngineHarness, base: Path, dtype: str) -> None:
        self.harness = harness
        self.sources = {"": None} | {n: source(path) for n, path in EXAMPLES.items()}
        tokenizer = TextTokenizer.from_folder(base)
        self.tokens = tokenizer.encode(PROBE, add_special_tokens=True)
        self.bound = BOUNDS[dtype]
        self.references = {name: self.reference(name) for name in self.sources}

    def judge(self) -> dict[str, Verdict]:
        served = self.harness.run(
            [
                {
                    "prompt": self.tokens,
                    "adapter": adapter,
                    "prompt_logprobs": True,
                    "use_prefix_cache": False,
                }
                for adapter in self.sources.values()
            ]
        )
        answers = [
            ProbeAnswers(name, answer.prompt_logprobs, self.references[name])
            for name, answer in zip(self.sources, served, strict=True)
        ]
        return dict(zip(self.sources, judge(answers, self.bound), strict=True))

    def failed(self) -> list[str]:
        verdicts = self.judge()
        print({name: (v.max_difference, v.nearest_other) for name, v in verdicts.items()})
        return [name for name, verdict in verdicts.items() if not verdict.passed]

    def exchange(self) -> None:
        """Each gets the other's weights; twice is as before."""
        tables = self.harness.memory.tables
        chat, code = (self.sources[name].weights_digest for name in EXAMPLES)  # type: ignore[union-attr]
        tables[chat], tables[code] = tables[code], tables[chat]

    def scale(self, name: str, by: float) -> None:
        """Another scaling in all modules of one adapter."""
        table = self.harness.memory.tables[self.sources[name].weights_digest]  # type: ignore[union-attr]

        def scaled(views: GroupViews | None) -> GroupViews | None:
            if views is None:
                return None
            return replace(views, expands=tuple((b, by * s) for b, s in views.expands))

        # A table of its own: a backend may keep what it read of one.
        other = copy.copy(table)
        other.views = tuple(tuple(map(scaled, column)) for column in table.views)
        self.harness.memory.tables[self.sources[name].weights_digest] = other  # type: ignore[union-attr]

    def perturb(self, name: str, layer: int) -> None:
        """A tenth more in one matrix B: that of q."""
        table = self.harness.memory.tables[self.sources[name].weights_digest]  # type: ignore[union-attr]
        views = table.views[0][layer]
        assert views is not None
        views.expands[0][0].mul_(1.1)

    def reference(self, name: str) -> list[float]:
        self.harness.tell(Reference(1, self.tokens, self.sources[name]))
        while not isinstance(done := self.harness.out.get(timeout=120), OperationDone):
            pass
        assert done.logprobs is not None
        return done.logprobs


def bench(base: Path, cache: Path, dtype: str) -> Iterator[Bench]:
    config = EngineConfig(
        base_folder=str(base),
        cache_folder=str(cache),
        base_name="smollm2-135m",
        weights_fingerprint="",
        device="cpu",
        quantization="nf4",
        dtype=dtype,  # type: ignore[arg-type]
        kv_cache_bytes=32 << 20,
    )
    with engine(config) as harness:
        yield Bench(harness, base, dtype)


@pytest.fixture(scope="module")
def rounded(base_folder: Path, cache_dir: Path) -> Iterator[Bench]:
    yield from bench(base_folder, cache_dir, "bfloat16")


@pytest.fixture(scope="module")
def full(base_folder: Path, cache_dir: Path) -> Iterator[Bench]:
    yield from bench(base_folder, cache_dir, "float32")


@pytest.mark.verify
def test_bfloat16_finds_an_exchange_and_a_doubled_adapter(rounded: Bench) -> None:
    assert rounded.failed() == []
    rounded.exchange()
    verdicts = rounded.judge()
    assert [v.passed for v in verdicts.values()] == [True, False, False]
    assert "as code should" in verdicts["chat"].detail
    assert verdicts["chat"].nearest_other < rounded.bound < verdicts["chat"].max_difference
    rounded.exchange()
    for name in EXAMPLES:
        rounded.scale(name, 2.0)
        assert rounded.failed() == [name]
        rounded.scale(name, 0.5)
    assert rounded.failed() == []


@pytest.mark.verify
def test_float32_finds_a_tenth_more_in_one_matrix(full: Bench) -> None:
    """One of the 210 B matrices of an adapter, in a layer of the middle."""
    assert full.failed() == []
    for name in EXAMPLES:
        full.perturb(name, layer=15)
        assert name in full.failed()
    assert full.failed() == list(EXAMPLES)


@pytest.mark.verify
def test_bfloat16_finds_a_layer_of_the_base_that_was_lost(rounded: Bench) -> None:
    """One linear of thirty layers, zeroed in the 4-bit weights that serve. The reference that
    is computed then is what it was: it reads the base's files."""
    linear = rounded.harness.runner.backend.weights.layers[0].down  # type: ignore[attr-defined]
    packed = linear.packed
    kept, before = packed.clone(), rounded.references[""]
    packed.zero_()
    try:
        assert "" in rounded.failed()
        np.testing.assert_allclose(rounded.reference(""), before, atol=1e-4)
    finally:
        packed.copy_(kept)
    assert rounded.failed() == []


def test_the_references_tell_the_examples_apart(rounded: Bench) -> None:
    """Negative control of the bound: all three lie farther apart than it is."""
    values = [np.array(reference) for reference in rounded.references.values()]
    for i, one in enumerate(values):
        for other in values[i + 1 :]:
            assert np.abs(one - other).max() > 2 * rounded.bound
