"""A real Prometheus scrapes a real server, and promtool reads what we ship."""

from __future__ import annotations

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.request import urlopen

import grpc
import pytest
import pytest_asyncio
from veneer_loadtest.results import RunResult, read_result
from veneer_proto.v1 import adapters_pb2, server_pb2

from tests.prometheus_harness import RULES, Prometheus, running_prometheus, tool
from tests.server_harness import Server, running_server

pytestmark = [pytest.mark.push, pytest.mark.real_base, pytest.mark.asyncio(loop_scope="module")]

DASHBOARD = RULES.parents[1] / "grafana" / "veneer.json"
REQUESTS = (("", 5), ("rank-4", 7), ("rank-16", 3), ("rank-4", 6))
"""Adapter and new tokens of each."""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "server.log"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def own(
    base_folder: Path,
    cache_dir: Path,
    real_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    log: Path,
) -> AsyncIterator[Server]:
    """A server that nobody else asks, so that its counts are exact."""
    tool("prometheus")
    folder = tmp_path_factory.mktemp("own") / "data"
    flags = ("--log-format", "json", "--metrics-names", "vllm")
    async with running_server(folder, cache_dir, *flags, log=log) as server:
        for name in ("rank-4", "rank-16"):
            await server.push(real_adapters[name], name)
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prometheus(
    own: Server, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Prometheus]:
    async with running_prometheus(tmp_path_factory.mktemp("prometheus"), own.metrics) as it:
        yield it


async def test_client_server_and_prometheus_agree(own: Server, prometheus: Prometheus) -> None:
    """To the request and to the token; a stream whose caller went away ends as such."""
    answers = await asyncio.gather(
        *(
            own.generate(
                prompt="Once upon a time",
                adapter=adapter,
                stopping={"max_tokens": new, "ignore_eos": True},
            )
            for adapter, new in REQUESTS
        )
    )
    usages = [answer.usage for answer in answers]
    await prometheus.scraped_after(time.time())
    values = prometheus.values
    assert await values("veneer_requests_total") == {
        '{"finish_reason": "length"}': len(REQUESTS)
    }
    assert await values("veneer_adapter_requests_total") == {
        '{"adapter_name": "rank-4", "tenant": "default"}': 2,
        '{"adapter_name": "rank-16", "tenant": "default"}': 1,
    }
    for name, of_clients in (
        ("generation_tokens", sum(usage.completion_tokens for usage in usages)),
        ("prompt_tokens", sum(usage.prompt_tokens for usage in usages)),
    ):
        assert await values(f"veneer_{name}_total") == {"{}": of_clients}
        # The same of each request, as a histogram.
        assert await values(f"veneer_request_{name}_sum") == {"{}": of_clients}
        assert await values(f"veneer_request_{name}_count") == {"{}": len(REQUESTS)}

    stream = own.stream(prompt="Go", stopping={"max_tokens": 7000, "ignore_eos": True})
    await stream.first()
    stream.call.cancel()
    while len(await own.metric("veneer_requests_total")) < 2:
        pass  # each look is a scrape; a cancelled request is counted once it has ended
    await prometheus.scraped_after(time.time())
    assert await values("veneer_requests_total") == {
        '{"finish_reason": "length"}': len(REQUESTS),
        '{"finish_reason": "cancelled"}': 1,
    }


async def test_series_of_an_evicted_adapter_end(own: Server, prometheus: Prometheus) -> None:
    await own.adapters.ActivateAdapter(adapters_pb2.ActivateAdapterRequest(name="rank-4"))
    await prometheus.scraped_after(time.time())
    name = 'veneer_adapter_loaded{adapter_name="rank-4"}'
    labels = {"adapter_name": "rank-4", "pinned": "false", "tenant": "default"}
    device = json.dumps({**labels, "tier": "device"})
    assert await prometheus.values(name) == {device: 1}
    await own.adapters.EvictAdapter(adapters_pb2.EvictAdapterRequest(name="rank-4"))
    await prometheus.scraped_after(time.time())
    assert await prometheus.values(name) == {}


async def test_a_router_sees_what_is_ready_by_vllms_names(
    own: Server, prometheus: Prometheus
) -> None:
    """Idle, as an endpoint picker reads it; the lists change with the memory."""

    async def lists() -> tuple[str, str]:
        await prometheus.scraped_after(time.time())
        (series,) = await prometheus.query("vllm:lora_requests_info")
        assert time.time() - 600 < float(series["value"][1]) <= time.time()
        labels = series["metric"]
        assert int(labels["max_lora"]) >= 1
        # Prometheus drops a label without a value.
        return labels.get("running_lora_adapters", ""), labels.get("waiting_lora_adapters", "")

    for name in ("rank-4", "rank-16"):
        await own.adapters.EvictAdapter(adapters_pb2.EvictAdapterRequest(name=name))
    assert await lists() == ("", "")
    await own.adapters.ActivateAdapter(adapters_pb2.ActivateAdapterRequest(name="rank-4"))
    assert await lists() == ("rank-4", "")
    loaded = await prometheus.query('vllm:lora_adapter_loaded{level="gpu"}')
    assert [series["metric"]["adapter_name"] for series in loaded] == ["rank-4"]
    (config,) = await prometheus.query("vllm:cache_config_info")
    size, blocks = (int(config["metric"][n]) for n in ("block_size", "num_gpu_blocks"))
    info = await own.about.GetServerInfo(server_pb2.GetServerInfoRequest())
    assert size * blocks == info.budgets.kv_cache_tokens
    sent = await prometheus.values("vllm:generation_tokens_total")
    ours = await prometheus.values("veneer_generation_tokens_total")
    assert sum(sent.values()) == sum(ours.values()) > 0


async def test_recorded_rules_have_values(own: Server, prometheus: Prometheus) -> None:
    """Each name that a rule records; a ratio of nothing is no value, so there is traffic."""
    recorded = [
        line.split()[-1] for line in RULES.read_text().splitlines() if "record:" in line
    ]
    assert len(recorded) == 6
    missing = set(recorded)
    async with asyncio.timeout(60):
        while missing:
            await own.generate(prompt="On", adapter="rank-16", stopping={"max_tokens": 2})
            for name in list(missing):
                if await prometheus.query(name):
                    missing.remove(name)


async def test_every_query_of_the_dashboard_has_data(
    own: Server, prometheus: Prometheus
) -> None:
    """As Grafana sends them, over a window as short as our scrapes."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    assert len(queries) > 30
    missing = set(queries)
    async with asyncio.timeout(90):
        while missing:
            await own.refused(own.generate(prompt="On", adapter="unknown"))
            await own.generate(prompt="On", adapter="rank-16", stopping={"max_tokens": 2})
            await own.generate(prompt="Off", stopping={"max_tokens": 2})
            await own.adapters.EvictAdapter(adapters_pb2.EvictAdapterRequest(name="rank-16"))
            for query in list(missing):
                sent = query.replace("$__rate_interval", "5s").replace("$instance", ".*")
                found = await prometheus.values(sent)
                # A tier of earlier tests has no traffic now, and so no quantile.
                if not all(map(math.isnan, found.values())):
                    missing.remove(query)


def in_the_container(folder: Path) -> Path:
    """The configuration of deploy/compose.yaml, with its secrets in a folder here."""
    text = RULES.with_name("compose.yml").read_text("utf-8")
    for secret in ("prometheus.key", "ca.pem"):
        assert f"/run/secrets/{secret}" in text
        (folder / secret).write_text("")
    (folder / RULES.name).write_bytes(RULES.read_bytes())
    file = folder / "compose.yml"
    file.write_text(text.replace("/run/secrets/", f"{folder}/"))
    return file


async def test_promtool_finds_nothing_wrong(own: Server, tmp_path: Path) -> None:
    """Names, types and help of what the server exposes; the rules and what they fire on.
    Its parser is that of the Gateway API Inference Extension (expfmt): of vLLM's names it
    objects to the colon, and to nothing else."""
    page = await asyncio.to_thread(
        lambda: urlopen(f"http://{own.metrics}/metrics", timeout=30).read()
    )
    lines = page.splitlines(keepends=True)
    metrics = b"".join(line for line in lines if b"vllm:" not in line)
    done = await asyncio.to_thread(
        subprocess.run,
        [tool("promtool"), "check", "metrics"],
        input=page,
        capture_output=True,
        check=False,
    )
    told = (done.stdout + done.stderr).decode().splitlines()
    assert done.returncode == 3, told  # 3: read, with objections
    assert [line for line in told if "vllm:" not in line or "':'" not in line] == []
    checks = (
        (["check", "metrics"], metrics),
        (["check", "config", str(RULES.with_name("prometheus.yml"))], b""),
        (["check", "config", str(in_the_container(tmp_path))], b""),
        (["test", "rules", str(RULES.with_name("rules_test.yml"))], b""),
    )
    for arguments, data in checks:
        done = await asyncio.to_thread(
            subprocess.run,
            [tool("promtool"), *arguments],
            input=data,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, (done.stdout + done.stderr).decode()


async def test_every_log_line_is_json_and_tells_no_prompt(own: Server, log: Path) -> None:
    """Of both processes; an answer's line says why its first token took so long."""
    await own.adapters.EvictAdapter(adapters_pb2.EvictAdapterRequest(name="rank-4"))
    secret = "Xylophone quixotic"
    await own.generate(
        request_id="of-3-am", adapter="rank-4", prompt=secret, stopping={"max_tokens": 2}
    )
    with pytest.raises(grpc.aio.AioRpcError):
        await own.generate(request_id="refused", adapter="nobody", prompt=secret)
    text = await asyncio.to_thread(log.read_text)
    assert "Xylophone" not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["process"] for line in lines} == {"front", "engine"}
    of_id = {line["request_id"]: line for line in lines if "request_id" in line}
    told = of_id["of-3-am"]
    assert (told["event"], told["outcome"], told["tier"]) == ("request", "length", "disk")
    assert told["adapter"].startswith("rank-4@")
    assert told["load_s"] > 0
    assert told["queue_s"] + told["load_s"] < told["first_token_s"] < told["total_s"]
    assert of_id["refused"]["event"] == "call refused"
    assert of_id["refused"]["reason"] == "ADAPTER_NOT_FOUND"
    loads = [line for line in lines if line["event"] == "adapter loaded"]
    assert {"read_s", "verify_s", "convert_s"} <= set(loads[-2])
    assert loads[-1]["adapter"] == "rank-4"


async def test_a_load_is_counted_alike_by_all_three(
    own: Server, prometheus: Prometheus, tmp_path: Path
) -> None:
    """A Zipf by the load tester: its totals, the server's counters and Prometheus'. Five
    seconds here; ``ZIPF_SECONDS=60`` for the full form."""
    seconds = os.environ.get("ZIPF_SECONDS", "5")
    names = ("requests", "prompt_tokens", "generation_tokens")

    async def counted() -> tuple[float, ...]:
        await prometheus.scraped_after(time.time())
        return tuple(
            [sum((await prometheus.values(f"veneer_{name}_total")).values()) for name in names]
        )

    before = await counted()
    file = tmp_path / "zipf.json"
    load = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "veneer_loadtest.cli",
        "run",
        "--server",
        own.address,
        *("--metrics", own.metrics, "--names", "rank-4,rank-16", "--popularity", "zipf:1"),
        *("--rate", "3", "--duration", f"{seconds}s", "--tokens", "1..16", "--text"),
        *("--json", str(file), "--fail-if", "error_share>0", "--fail-if", "lost>0"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await load.communicate()
    assert load.returncode == 0, output.decode()
    result = read_result(file)
    assert isinstance(result, RunResult)
    (level,) = result.levels
    assert level.server is not None
    assert level.server.agrees is True
    grown = tuple(after - was for after, was in zip(await counted(), before, strict=True))
    totals = level.totals
    assert grown == (totals.requests, totals.prompt_tokens, totals.tokens)
    assert totals.requests > 0
    print(f"{totals}, by client, server and Prometheus")
