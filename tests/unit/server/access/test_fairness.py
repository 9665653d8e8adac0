"""Whose service a call counts as, and what one tenant's backlog does to another's calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from veneer_proto.v1 import inference_pb2
from veneer_registry.errors import EngineFailed, InvalidField
from veneer_server.access.edit_keys import add_key
from veneer_server.access.keys import parse_identities
from veneer_server.queues.fairness import MAX_PRIORITY
from veneer_server.serving.samples import sample_seed
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.tenant_series import MAX_TENANTS
from veneer_server.text.tokenizer import TextTokenizer
from veneer_server.wire.messages import SequenceRequest

from tests.refused import refused
from tests.unit.server.rpc.fake_engine import fake_tokens
from tests.unit.server.rpc.front_harness import Front, failure, prompt, running, until

FAIRNESS = "x-llm-d-inference-fairness-id"
OBJECTIVE = "x-llm-d-inference-objective"
OLDER = ("x-gateway-inference-fairness-id", "x-gateway-inference-objective")


@dataclass
class Shared:
    """A front whose callers are a hog, a light tenant and a gateway."""

    front: Front
    file: Path
    keys: dict[str, str]

    def metadata(self, who: str, **more: str) -> Any:
        named = ((name.replace("_", "-"), value) for name, value in more.items())
        return (("authorization", f"Bearer {self.keys[who]}"), *named)

    def generate(self, who: str, request: Any = None, **call: Any) -> Any:
        asked = prompt() if request is None else request
        return self.front.inference.Generate(asked, metadata=self.metadata(who), **call)

    async def post(self, who: str, headers: dict[str, str], **fields: Any) -> httpx.Response:
        url = f"http://{self.front.addresses['openai']}/v1/completions"
        body = {"model": "smollm2-135m", "prompt": "Hello", "max_tokens": 1, **fields}
        headers = {"authorization": f"Bearer {self.keys[who]}", **headers}
        async with httpx.AsyncClient(trust_env=False, timeout=60) as http:
            return await http.post(url, json=body, headers=headers)

    async def metrics(self) -> str:
        url = f"http://{self.front.addresses['metrics']}/metrics"
        headers = {"authorization": f"Bearer {self.keys['scraper']}"}
        async with httpx.AsyncClient(trust_env=False) as http:
            return (await http.get(url, headers=headers)).text

    def last(self) -> SequenceRequest:
        return self.front.engine.submitted[-1]


@asynccontextmanager
async def sharing(
    base: Path, cache: Path, folder: Path, *, tables: str = "", **flags: str
) -> AsyncIterator[Shared]:
    file = folder / "keys.toml"
    keys = {
        name: add_key(
            file,
            name=name,
            tenant=name,
            roles=["metrics" if name == "scraper" else "inference"],
            expires=None,
            gateway=name == "gateway",
        ).key
        for name in ("hog", "light", "gateway", "scraper")
    }
    file.write_text(file.read_text() + tables)
    async with running(
        base,
        cache,
        folder / "front",
        keys_file=str(file),
        openai_listen="127.0.0.1:0",
        **flags,
    ) as front:
        yield Shared(front, file, keys)


TABLES = """
[tenants.hog]
weight = 0.5
[tenants.gateway]
weight = 3
[objectives.batch]
priority = 20
"""


@pytest.mark.push
async def test_only_a_gateway_says_whom_it_calls_for(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with sharing(base_folder, front_cache, tmp_path, tables=TABLES) as shared:
        expected = {
            "hog": ("hog", "", 0.5, 0),
            "light": ("light", "", 1.0, 0),
            "gateway": ("gateway", "ann", 3.0, 20),
        }
        headers = {FAIRNESS: "ann", OBJECTIVE: "batch"}
        older = dict(zip(OLDER, ("ann", "batch"), strict=True))
        for who, right in expected.items():
            for named in (headers, older):
                await shared.front.inference.Generate(
                    prompt(), metadata=shared.metadata(who, **named)
                )
                assert shares(shared.last()) == right
                assert (await shared.post(who, named)).status_code == 200
                assert shares(shared.last()) == right
        # It gives no access: whose prefixes it may find is still the gateway's own.
        assert shared.last().cache_scope == "gateway"
        await shared.front.inference.Generate(
            prompt(priority=-7), metadata=shared.metadata("gateway", **headers)
        )
        assert shared.last().priority == -7, "a request's own priority counts"
        for odd in ("", "x" * 129, "two words", "ümlaut"):
            await shared.post("gateway", {FAIRNESS: odd.encode("utf-8")})  # type: ignore[dict-item]
            assert shares(shared.last()) == ("gateway", "", 3.0, 0), odd


def shares(request: SequenceRequest) -> tuple[str, str, float, int]:
    return request.tenant, request.fairness_id, request.weight, request.priority


async def test_a_weight_counts_from_the_next_request_on(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with sharing(base_folder, front_cache, tmp_path) as shared:
        text = shared.file.read_text()
        for tables, right in (
            ("", 1.0),
            ("[tenants.hog]\nweight = 4", 4.0),
            ("[tenants.hog]\nweight = nan", 4.0),  # not valid: the last one stays
            ("[tenants.hog]\nweight = 0.25", 0.25),
            ("", 1.0),
        ):
            shared.file.write_text(f"{text}\n{tables}\n")
            await shared.generate("hog")
            assert shared.last().weight == right, tables


@pytest.mark.parametrize(
    "weight", ["0", "-1", "1e9", "nan", "inf", "-inf", "true", '"2"', "[]", "0.0001"]
)
def test_a_weight_that_is_none_is_refused(weight: str) -> None:
    with refused(InvalidField, field="tenants.a.weight"):
        parse_identities(f"[tenants.a]\nweight = {weight}", Path("keys.toml"))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[objectives.a]\npriority = 1.5", "objectives.a.priority"),
        ("[objectives.a]\npriority = 101", "objectives.a.priority"),
        ("[objectives.a]\npriority = true", "objectives.a.priority"),
        ("[objectives.a]\nweight = 1", "objectives.a.weight"),
        ("[tenants.A]\nweight = 1", "tenants.A"),
        ("[tenants.a]\nwieght = 1", "tenants.a.wieght"),
        ("tenants = 3", "tenants"),
    ],
)
def test_tables_that_are_wrong_name_the_entry(text: str, field: str) -> None:
    with refused(InvalidField, field=field):
        parse_identities(text, Path("keys.toml"))


async def test_a_priority_of_the_wrong_kind_is_refused(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with sharing(base_folder, front_cache, tmp_path) as shared:
        for wrong in ("high", 1.5, True, [1], {}, 101, -101, 1 << 70):
            answer = await shared.post("light", {}, priority=wrong)
            assert answer.status_code == 400, wrong
            assert answer.json()["error"]["param"] == "priority"
        for outside in (MAX_PRIORITY + 1, -MAX_PRIORITY - 1, -(1 << 31)):
            failed = await failure(shared.generate("light", prompt(priority=outside)))
            assert (failed.reason, failed.metadata["field"]) == ("INVALID_FIELD", "priority")
        assert shared.front.engine.submitted == []
        assert (await shared.post("light", {}, priority=-3)).status_code == 200
        assert shared.last().priority == -3


# ------------------------------------------------------------------------ overload


async def test_a_backlog_takes_no_place_of_another_tenant(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"max_running": "2", "max_queue": "6"}
    async with sharing(base_folder, front_cache, tmp_path, **flags) as shared:
        engine = shared.front.engine
        engine.pace = asyncio.Semaphore(0)
        hogs = []
        for _ in range(7):
            hogs.append(shared.generate("hog"))
            await until(lambda: engine.places.taken == len(hogs))
        last = asyncio.create_task(shared.post("hog", {}))
        await until(lambda: engine.places.taken == 8)
        over = await failure(shared.generate("hog"))
        assert (over.reason, over.metadata["cause"]) == ("QUEUE_FULL", "queue_full")
        light = [shared.generate("light") for _ in range(2)]
        # The newest ones of the hog, over gRPC and HTTP.
        failed, answer = await failure(hogs[-1]), await last
        assert failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (failed.reason, failed.metadata["cause"]) == ("QUEUE_FULL", "displaced")
        assert "RetryInfo" in failed.details
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        text = await shared.metrics()
        assert 'veneer_tenant_requests_waiting{tenant="hog"} 6.0' in text
        assert 'veneer_tenant_requests_waiting{tenant="light"} 2.0' in text
        refusals = 'veneer_tenant_refusals_total{cause="displaced",tenant="hog"} 2.0'
        assert refusals in text
        for _ in range(100):
            engine.pace.release()
        for call in [*hogs[:-1], *light]:
            assert len((await call).token_ids) == 4
        await until(lambda: engine.places.taken == engine.places.samples == 0)
        text = await shared.metrics()
        assert 'veneer_tenant_queue_time_seconds_count{tenant="light"} 2.0' in text


@pytest.mark.push
async def test_a_call_that_has_begun_holds_no_more_than_what_runs(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """Five prompts with four samples each: they were 20 places, all that there are, until the
    last one's end. What waits is nobody's loss, and the answer is what it is alone."""
    flags = {"max_running": "4", "max_queue": "16"}
    many = {"prompt": [[100 + at, 7] for at in range(5)], "n": 4, "max_tokens": 3, "seed": 5}
    async with sharing(base_folder, front_cache, tmp_path, **flags) as shared:
        engine = shared.front.engine
        engine.pace = asyncio.Semaphore(0)
        hog = asyncio.create_task(shared.post("hog", {}, **many))
        await until(lambda: engine.in_flight == 4)
        engine.pace.release()
        await until(lambda: engine.pace is not None and engine.pace.locked())
        light = [shared.generate("light") for _ in range(8)]
        await until(lambda: engine.places.taken >= 12)
        # Four that run, one in advance.
        assert engine.places.taken <= 8 + 5
        assert engine.places.waiting()["light"] == 8
        for _ in range(1000):
            engine.pace.release()
        for call in light:
            assert len((await call).token_ids) == 4
        answer = await hog
        assert answer.status_code == 200, answer.text
        await until(lambda: engine.places.taken == engine.places.samples == 0)
    choices = answer.json()["choices"]
    assert [choice["index"] for choice in choices] == list(range(20))
    tokenizer = TextTokenizer.from_folder(base_folder)
    for at, choice in enumerate(choices):
        prompt_ids, seed = many["prompt"][at // 4], sample_seed(5, at % 4)
        right = tokenizer.decode(fake_tokens("", prompt_ids, seed, 3))
        assert choice["text"] == right, at
    assert answer.json()["usage"]["completion_tokens"] == 60


@pytest.mark.push
async def test_samples_that_wait_end_with_their_call(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """When its caller leaves, and when the engine ends."""
    flags = {"max_running": "1", "max_queue": "15"}
    async with sharing(base_folder, front_cache, tmp_path, **flags) as shared:
        engine = shared.front.engine
        several = prompt(output=inference_pb2.OutputOptions(n=16))
        for ending in ("leave", "crash"):
            engine.pace = asyncio.Semaphore(0)
            call = shared.front.inference.GenerateStream(
                several, metadata=shared.metadata("hog")
            )
            engine.pace.release()
            await anext(aiter(call))
            await until(lambda: engine.places.taken == 2)
            if ending == "leave":
                call.cancel()
            else:
                engine.crash()
                engine.places.fail(EngineFailed("the engine ended; retry"))
                failed = await failure(_rest(call))
                assert failed.reason == "ENGINE_FAILED"
            await until(lambda: engine.places.taken == engine.places.samples == 0)
            await until(lambda: engine.in_flight == 0)


async def _rest(call: Any) -> None:
    async for _ in call:
        pass


@pytest.mark.push
async def test_a_sample_that_gave_its_place_back_is_computed_later(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """The queue has one place: the hog's next sample had it, and a light tenant's call, which
    has less, gets it."""
    flags = {"max_running": "2", "max_queue": "1"}
    async with sharing(base_folder, front_cache, tmp_path, **flags) as shared:
        engine = shared.front.engine
        engine.pace = asyncio.Semaphore(0)
        asked = prompt(
            sampling=inference_pb2.SamplingOptions(seed=7),
            output=inference_pb2.OutputOptions(n=3),
            stopping=inference_pb2.StoppingOptions(max_tokens=30),
        )
        call = shared.generate("hog", asked)
        await until(lambda: engine.in_flight == 1)
        while engine.places.taken < 3:
            engine.pace.release()
            for _ in range(100):  # until a sample has it
                await asyncio.sleep(0)
        light = shared.generate("light")
        await until(lambda: engine.places.waiting().get("light") == 1)
        for _ in range(100):
            engine.pace.release()
        assert len((await light).token_ids) == 4
        answer = await call
        ids = engine.submitted[0].prompt
        expected = [fake_tokens("", ids, sample_seed(7, index), 30) for index in range(3)]
        assert [list(answer.token_ids), *(list(o.token_ids) for o in answer.others)] == expected
        await until(lambda: engine.places.taken == engine.places.samples == 0)


@pytest.mark.push
async def test_what_expires_or_leaves_gives_back_its_place_at_once(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    """All at the same time, too."""
    flags = {"max_running": "2", "max_queue": "100"}
    async with sharing(base_folder, front_cache, tmp_path, **flags) as shared:
        engine = shared.front.engine
        engine.pace = asyncio.Semaphore(0)
        stays = shared.generate("light")
        expiring = [shared.generate("hog", timeout=0.5) for _ in range(50)]
        leaving = [shared.generate("hog") for _ in range(40)]
        await until(lambda: engine.in_flight == 91)
        for call in leaving:
            call.cancel()
        for call in expiring:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await until(lambda: engine.places.taken == engine.in_flight == 1)
        assert engine.cancelled == 90
        assert engine.places.waiting() == {"light": 1}
        for _ in range(4):
            engine.pace.release()
        await stays


async def test_the_longest_wait_is_the_operators(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    flags = {"max_running": "1", "max_queue_wait": "0.3"}
    async with sharing(base_folder, front_cache, tmp_path, **flags) as shared:
        shared.front.engine.pace = asyncio.Semaphore(0)
        failed = await failure(shared.generate("light"))
        assert (failed.reason, failed.metadata["cause"]) == ("QUEUE_FULL", "queue_wait")
        assert "RetryInfo" in failed.details
        await until(lambda: shared.front.engine.in_flight == 0)


def test_metrics_name_few_tenants() -> None:
    metrics = Metrics()
    for number in range(1000):
        metrics.tenants.waited(f"tenant {number}", 1.0)
        metrics.tenants.refused(f"tenant {number}", "queue_full")
    metrics.tenants.waiting = lambda: {f"tenant {number}": 2 for number in range(1000)}
    for family in metrics.registry.collect():
        labels = {s.labels["tenant"] for s in family.samples if "tenant" in s.labels}
        assert len(labels) in (0, MAX_TENANTS + 1), family.name
