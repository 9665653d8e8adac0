"""``--metrics-names vllm``: what a router reads from a page, by the names that it asks for."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from veneer_server.telemetry.metrics import Metrics
from veneer_server.telemetry.vllm_names import MAX_ROUTED, VllmSeries
from veneer_server.wire.messages import Occupancy, ResidencyChanged, TierName

from tests.unit.server.rpc.front_harness import make_adapter, prompt, running

Labels = tuple[tuple[str, str], ...]
Page = dict[str, dict[Labels, float]]

MODEL = (("engine", "0"), ("model_name", "smollm2-135m"))
READ = {
    # Of the endpoint pickers (Gateway API Inference Extension, llm-d).
    "vllm:num_requests_waiting": "gauge",
    "vllm:num_requests_running": "gauge",
    "vllm:kv_cache_usage_perc": "gauge",
    "vllm:cache_config_info": "gauge",
    "vllm:lora_requests_info": "gauge",
    "vllm:lora_adapter_loaded": "gauge",
    "vllm:num_gpu_loaded_lora_adapters": "gauge",
    "vllm:num_cpu_loaded_lora_adapters": "gauge",
    "vllm:max_gpu_lora_adapters": "gauge",
    # Of AIBrix's gateway and of dashboards.
    "vllm:prompt_tokens": "counter",
    "vllm:generation_tokens": "counter",
    "vllm:prefix_cache_queries": "counter",
    "vllm:prefix_cache_hits": "counter",
    "vllm:request_success": "counter",
    "vllm:time_to_first_token_seconds": "histogram",
    "vllm:inter_token_latency_seconds": "histogram",
    "vllm:e2e_request_latency_seconds": "histogram",
    "vllm:request_queue_time_seconds": "histogram",
    "vllm:request_prompt_tokens": "histogram",
    "vllm:request_generation_tokens": "histogram",
}
"""By family, the type that its readers expect."""


ACCEPTED = (
    "",
    "text/plain;version=0.0.4",
    "application/openmetrics-text;version=1.0.0",
    # Prometheus 2.53, and 3.
    "application/openmetrics-text;version=1.0.0;escaping=underscores;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.5,*/*;q=0.2",
    "text/plain;version=1.0.0;escaping=underscores",
)


def parsed(page: str) -> Page:
    """The samples of vLLM's names: name -> labels -> value."""
    found: Page = {}
    for family in text_string_to_metric_families(page):
        if family.name.startswith("vllm:"):
            found.setdefault(family.name, {})
        for sample in family.samples:
            if sample.name.startswith("vllm:"):
                labels = tuple(sorted(sample.labels.items()))
                assert labels not in found.setdefault(sample.name, {}), "a series twice"
                found[sample.name][labels] = sample.value
    return found


class Names(dict[str, tuple[str, ...]]):
    """FAKE tenants: key of weights -> what callers write for them."""

    def __contains__(self, name: object) -> bool:
        return False

    def __len__(self) -> int:
        return 0

    def names(self, key: str) -> tuple[str, ...]:
        return self.get(key, ())

    asked_as = names


class World:
    def __init__(self) -> None:
        self.now = 100.0
        self.metrics = Metrics()
        self.names = Names()
        self.metrics.adapters.catalog = self.names
        self.metrics.registry.register(
            VllmSeries(
                self.metrics, model="smollm2-135m", kv_tokens=1000, clock=lambda: self.now
            )
        )

    def resident(self, digest: str, tier: TierName, *, pinned: bool = False) -> None:
        self.metrics.on_event(ResidencyChanged(digest, tier, pinned, 10, 0, 0, 1, 1))

    def occupied(self, *running: str, waiting: tuple[str, ...] = ()) -> None:
        self.metrics.on_event(
            Occupancy(3, 2, 1, 25, 100, running_adapters=running, waiting_adapters=waiting)
        )

    @property
    def page(self) -> Page:
        return parsed(generate_latest(self.metrics.registry).decode())

    @property
    def info(self) -> tuple[dict[str, str], float]:
        ((labels, value),) = self.page["vllm:lora_requests_info"].items()
        return dict(labels), value


@pytest.fixture
def world() -> World:
    return World()


def loaded(name: str, level: str, pinned: str = "false") -> Labels:
    return (("adapter_name", name), MODEL[0], ("level", level), MODEL[1], ("pinned", pinned))


def test_load_and_cache_are_what_ours_are(world: World) -> None:
    world.occupied()
    page = world.page
    assert page["vllm:num_requests_running"] == {MODEL: 3}
    assert page["vllm:num_requests_waiting"] == {MODEL: 2}
    assert page["vllm:kv_cache_usage_perc"] == {MODEL: 0.25}
    ((labels, value),) = page["vllm:cache_config_info"].items()
    assert (dict(labels), value) == (
        {"block_size": "16", "num_gpu_blocks": "62", "engine": "0"},
        1,
    )


def test_every_family_is_there_from_the_start_with_its_type(world: World) -> None:
    """A router that finds a family missing reports an error at each scrape."""
    text = generate_latest(world.metrics.registry).decode()
    types = {f.name: f.type for f in text_string_to_metric_families(text)}
    assert {name: types.get(name) for name in READ} == READ
    assert world.page["vllm:num_gpu_loaded_lora_adapters"] == {MODEL: 0}
    assert world.page["vllm:lora_adapter_loaded"] == {}


def test_an_idle_server_lists_what_is_ready(world: World) -> None:
    """vLLM lists only adapters of running requests, so that a warm server looks cold."""
    world.metrics.set_budgets(host=100, device=55)
    world.names |= {"d1": ("chat", "chat/prod"), "d2": ("code",), "d3": ("sql",)}
    world.resident("d1", "device")
    world.resident("d2", "host")
    world.occupied()
    assert world.info[0] == {
        "max_lora": "5",
        "running_lora_adapters": "chat,chat/prod",
        "waiting_lora_adapters": "",
    }
    world.occupied("d1", waiting=("d1", "d2", "d3"))
    assert world.info[0]["running_lora_adapters"] == "chat,chat/prod"
    assert world.info[0]["waiting_lora_adapters"] == "code,sql"
    world.resident("d1", "host")
    assert world.info[0]["running_lora_adapters"] == ""


def test_the_value_is_the_time_of_the_last_change(world: World) -> None:
    """Also of one that no event tells: a name is moved, or deleted."""
    world.names["d1"] = ("chat",)
    world.resident("d1", "device")
    assert world.info[1] == 100
    world.now = 200.0
    world.occupied("d1")
    assert world.info[1] == 100, "the lists are the same"
    world.names["d1"] = ("chat", "talk")
    assert world.info[1] == 200
    world.now = 300.0
    world.resident("d1", "disk")
    assert world.info == (
        {"max_lora": world.info[0]["max_lora"], "running_lora_adapters": "",
         "waiting_lora_adapters": ""},
        300,
    )  # fmt: skip


def test_each_adapter_in_memory_is_a_series_until_it_is_evicted(world: World) -> None:
    world.names |= {"d1": ("chat",), "d2": ("code",), "team:d3": ("chat",)}
    world.resident("d1", "device", pinned=True)
    world.resident("d2", "host")
    world.resident("team:d3", "device", pinned=True)
    world.resident("d4", "device")  # of no name any more
    assert world.page["vllm:lora_adapter_loaded"] == {
        loaded("chat", "gpu", "true"): 1,
        loaded("code", "cpu"): 1,
    }
    assert world.page["vllm:num_gpu_loaded_lora_adapters"] == {MODEL: 3}
    assert world.page["vllm:num_cpu_loaded_lora_adapters"] == {MODEL: 1}
    world.resident("d2", "disk")
    world.resident("d1", "disk", pinned=True)
    world.resident("team:d3", "disk")
    assert world.page["vllm:lora_adapter_loaded"] == {}


def test_names_are_bounded_and_running_ones_are_kept(world: World) -> None:
    for n in range(MAX_ROUTED + 50):
        world.names[f"d{n}"] = (f"a{n:04}",)
        world.resident(f"d{n}", "device")
    world.occupied("d7")
    running = world.info[0]["running_lora_adapters"].split(",")
    assert len(running) == len(set(running)) == MAX_ROUTED
    assert running[:2] == ["a0007", f"a{MAX_ROUTED + 49:04}"], "running first, then newest"
    assert len(world.page["vllm:lora_adapter_loaded"]) == MAX_ROUTED


def test_times_and_counts_are_the_sums_over_our_labels(world: World) -> None:
    metrics = world.metrics
    for tier in ("disk", "device", "none"):
        metrics.first_token.labels(tier).observe(0.03)
    metrics.inter_token.observe(0.2)
    metrics.generation_tokens.inc(7)
    metrics.prefix_asked.inc(40)
    metrics.prefix_found.inc(16)
    metrics.requests.labels("length").inc(2)
    metrics.requests.labels("cancelled").inc()
    page = world.page
    assert page["vllm:time_to_first_token_seconds_count"] == {MODEL: 3}
    assert page["vllm:time_to_first_token_seconds_sum"][MODEL] == pytest.approx(0.09)
    by_le = {
        dict(k)["le"]: v for k, v in page["vllm:time_to_first_token_seconds_bucket"].items()
    }
    assert (by_le["0.02"], by_le["0.04"], by_le["+Inf"]) == (0, 3, 3)
    assert page["vllm:inter_token_latency_seconds_count"] == {MODEL: 1}
    assert page["vllm:generation_tokens_total"] == {MODEL: 7}
    assert page["vllm:prefix_cache_queries_total"] == {MODEL: 40}
    assert page["vllm:prefix_cache_hits_total"] == {MODEL: 16}
    ended = {
        dict(k)["finished_reason"]: v for k, v in page["vllm:request_success_total"].items()
    }
    assert ended == {"length": 2, "abort": 1}


async def test_both_ports_show_what_a_push_and_a_request_made_ready(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with (
        httpx.AsyncClient(trust_env=False) as http,
        running(
            base_folder,
            front_cache,
            tmp_path / "front",
            metrics_names="vllm",
            openai_listen="127.0.0.1:0",
        ) as front,
    ):
        await front.push(make_adapter(tmp_path / "a"), "chat")
        await front.inference.Generate(prompt(adapter="chat"))
        pages = [
            (await http.get(f"http://{front.addresses[port]}/metrics")).text
            for port in ("metrics", "openai")
        ]
        for accept in ACCEPTED:
            url = f"http://{front.addresses['metrics']}/metrics"
            answer = await http.get(url, headers={"accept": accept})
            lines = answer.text.splitlines()
            named = {line.split("{")[0].split(" ")[0] for line in lines if "vllm" in line}
            assert {"vllm:num_requests_running", "vllm:lora_requests_info"} <= named, accept
            assert not [line for line in lines if "vllm_" in line], accept
        for page in map(parsed, pages):
            assert set(READ) <= set(page)
            assert page["vllm:generation_tokens_total"] == {MODEL: 4}
        assert "veneer_num_requests_running" in pages[0], "ours stay"


async def test_without_the_flag_there_are_only_ours(
    base_folder: Path, front_cache: Path, tmp_path: Path
) -> None:
    async with running(base_folder, front_cache, tmp_path / "front") as front:
        page = await front.metrics()
        assert "veneer_" in page
        assert "vllm:" not in page
