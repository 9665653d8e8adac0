"""From records to figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server
from veneer_loadtest.errors import BadResult, TargetFailed
from veneer_loadtest.load.figures import OTHER, distribution, level
from veneer_loadtest.load.generator import LoadOutcome
from veneer_loadtest.load.records import Outcome, Record, pack_gaps
from veneer_loadtest.load.spec import AdapterMix, Closed, Lengths, LoadSpec
from veneer_loadtest.load.summary import summary
from veneer_loadtest.results import (
    Level,
    RunResult,
    SloLimits,
    Totals,
    read_result,
    write_result,
)
from veneer_loadtest.server_metrics import MetricsWatch

from tests.ports import free_port
from tests.refused import refused

LOAD = LoadSpec(
    adapters=("a", "b"),
    arrivals=Closed(1),
    popularity=AdapterMix(),
    prompt_tokens=Lengths(1, 1),
    tokens=Lengths(1, 1),
    duration_s=10.0,
    warmup_s=2.0,
    requests=0,
    cancel_share=0.0,
    seed=1,
    vocab=100,
)


def record(
    index: int,
    due_s: float,
    arrivals: list[float],
    outcome: Outcome = "ok",
    **more: object,
) -> Record:
    """A request of 10 prompt tokens; ``arrivals`` are seconds after it was due."""
    times = [due_s + after for after in arrivals]
    return Record(
        **{  # type: ignore[arg-type]
            "index": index,
            "adapter": "a",
            "due_s": due_s,
            "sent_s": due_s + 0.001,
            "first_s": times[0] if times else None,
            "end_s": times[-1] if times else due_s,
            "prompt_tokens": 10,
            "cached": 0,
            "tokens": len(times),
            "outcome": outcome,
            "gaps": pack_gaps(times),
            **more,
        }
    )


def figures(records: list[Record], limits: SloLimits | None = None, **more: object) -> Level:
    wall = max((r.end_s for r in records), default=0.0)
    loaded = LoadOutcome(records=records, sent={0: len(records)}, wall_s=wall, cpu_s=wall / 4)
    return level(LOAD, loaded, workers=1, limits=limits, **more)  # type: ignore[arg-type]


def test_percentiles_are_of_all_values() -> None:
    values = distribution(list(range(1, 1001)))
    assert values is not None
    assert (values.count, values.max) == (1000, 1000)
    assert values.p50 == pytest.approx(500.5)
    assert values.p99 == pytest.approx(990.01)
    assert values.p999 == pytest.approx(999.001)
    assert values.cdf[0] == (1.0, 0.0)
    assert values.cdf[-1] == (1000.0, 1.0)
    assert values.cdf == sorted(values.cdf)
    assert distribution([]) is None


def test_shares_by_tier_and_the_ratio_of_two_levels() -> None:
    tiers = ["device"] * 5 + ["host"] * 3 + ["disk"] * 2 + [""] * 4
    many = figures([record(n, 3.0 + n / 10, [0.1], tier=tier) for n, tier in enumerate(tiers)])
    few = figures([record(n, 3.0 + n / 10, [0.1, 0.2]) for n in range(7)])
    found = summary(many, few)
    assert found["device_hit_share"] == pytest.approx(0.5), "of those with an adapter"
    assert found["host_hit_share"] == pytest.approx(0.3)
    assert found["disk_share"] == pytest.approx(0.2)
    assert found["requests_ratio"] == pytest.approx(many.requests_per_s / few.requests_per_s)
    assert found["tokens_ratio"] == pytest.approx(many.tokens_per_s / few.tokens_per_s)
    assert found["requests_ratio"] > 1, "14 against 7"
    assert found["requests_ratio"] != pytest.approx(found["tokens_ratio"]), "1 token against 2"
    assert found["first_token_max_ms"] == pytest.approx(100)
    assert not {"device_hit_share", "requests_ratio", "tokens_ratio"} & set(summary(few, few))


def test_warm_up_is_in_no_figure_but_in_the_totals() -> None:
    found = figures(
        [
            record(0, 0.0, [1.0, 1.5, 3.0]),  # the last token comes in the window
            record(1, 2.0, [0.1, 0.2]),
            record(2, 9.0, [0.5, 1.5]),  # the last one after the window
        ]
    )
    assert found.window_s == pytest.approx(8)
    assert found.requests.ok == 2
    assert found.first_token_ms is not None
    assert found.first_token_ms.max == pytest.approx(500)
    assert found.tokens_per_s == pytest.approx(4 / 8)
    assert found.requests_per_s == pytest.approx(2 / 8), "those that ended in the window"
    assert found.totals == Totals(requests=3, prompt_tokens=30, tokens=7)
    assert found.generator.cpu_share == pytest.approx(0.25)
    assert found.generator.late_max_ms == pytest.approx(1.0)


def test_what_failed_was_left_or_stopped() -> None:
    found = figures(
        [
            record(0, 2.0, [0.1, 0.2]),
            record(1, 3.0, [], "failed", reason="QUEUE_FULL"),
            record(2, 3.0, [0.4], "failed", reason="TIMEOUT"),
            record(3, 4.0, [], "failed", reason="QUEUE_FULL"),
            record(4, 4.0, [0.3], "left"),
            record(5, 5.0, [9.0], "stopped"),
        ]
    )
    requests = found.requests
    assert (requests.ok, requests.failed, requests.left, requests.stopped) == (1, 3, 1, 1)
    assert found.errors == {"QUEUE_FULL": 2, "TIMEOUT": 1}
    assert found.first_token_ms is not None
    assert found.first_token_ms.count == 3, "also of those whose end did not come"
    assert found.end_to_end_ms is not None
    assert found.end_to_end_ms.count == 1
    assert summary(found)["error_share"] == pytest.approx(0.75)


def test_goodput() -> None:
    limits = SloLimits(ttft_ms=150, tpot_ms=60)
    found = figures(
        [
            record(0, 2.0, [0.1, 0.15, 0.2]),
            record(1, 2.0, [0.2, 0.25, 0.3]),  # first token too late
            record(2, 2.0, [0.1, 0.11, 0.3]),  # 100 ms a token on average
            record(3, 2.0, [0.1]),  # one token: no time between any
            record(4, 2.0, [], "failed"),
            record(5, 2.0, [0.1], "left"),
            record(6, 10.0, [0.1]),
        ],
        limits,
    )
    assert found.slo is not None
    assert found.slo.good == 3
    assert found.slo.share == pytest.approx(3 / 6)
    assert found.slo.goodput_per_s == pytest.approx(2 / 8), "one ended after the window"
    late = figures([record(0, 2.0, [3.0])], SloLimits(e2e_ms=2999))
    assert late.slo is not None
    assert late.slo.good == 0


def test_rates_are_of_what_came_in_the_window() -> None:
    """Not of what was asked for: an overloaded server goes on long after it."""
    records = [record(i, 3.0, [0.5 + i, 1.0 + i]) for i in range(20)]  # one a second
    found = figures(records, SloLimits(e2e_ms=60_000))
    assert found.window_s == pytest.approx(8)
    assert found.requests_per_s == pytest.approx(7 / 8)
    assert found.prompt_tokens_per_s == pytest.approx(7 * 10 / 8)
    assert found.slo is not None
    assert (found.slo.share, found.slo.goodput_per_s) == (1.0, pytest.approx(7 / 8))


def test_chunks_that_held_several_tokens() -> None:
    """Where a server tells only the sum: four chunks, eight tokens."""
    found = figures([record(0, 2.0, [0.1, 0.2, 0.3, 0.4], tokens=8)], SloLimits(tpot_ms=50))
    assert found.tokens_per_s * found.window_s == pytest.approx(8)
    assert sum(found.timeline.tokens) == 8
    assert found.slo is not None
    assert found.slo.good == 1, "300 ms for seven tokens"


def test_splits_by_tier_and_adapter() -> None:
    found = figures(
        [
            record(0, 2.0, [0.1, 0.2], tier="device", load_s=0.0, queue_s=0.001),
            record(1, 3.0, [0.5, 0.6], tier="disk", load_s=0.4, queue_s=0.002, adapter="b"),
            record(2, 4.0, [0.3, 0.4], tier="device", load_s=0.0, queue_s=0.003),
            record(3, 5.0, [0.1], adapter=""),
        ]
    )
    assert {tier: split.requests for tier, split in found.by_tier.items()} == {
        "device": 2,
        "disk": 1,
        "none": 1,
    }
    disk = found.by_tier["disk"]
    assert disk.first_token_p50_ms == pytest.approx(500)
    assert disk.load_p50_ms == pytest.approx(400)
    assert found.by_tier["none"].inter_token_p50_ms is None
    assert {name: split.requests for name, split in found.by_adapter.items()} == {
        "a": 2,
        "b": 1,
        "": 1,
    }
    assert [(load.adapter, load.tier) for load in found.loads] == [("b", "disk")]
    assert found.queue_ms is not None
    assert found.queue_ms.p50 == pytest.approx(2)


def test_adapters_past_the_first_200_are_told_together() -> None:
    records = [
        record(i, 2.0, [0.1], adapter=f"n{i % 250}") for i in range(700)
    ]  # 200 names three times, 50 twice
    found = figures(records)
    assert len(found.by_adapter) == 201
    assert found.by_adapter[OTHER].requests == 100
    assert list(found.by_adapter)[-1] == OTHER


def test_timeline() -> None:
    found = figures([record(0, 0.0, [0.1, 0.3, 0.6]), record(1, 0.3, [0.1, 0.5])])
    line = found.timeline
    assert line.bucket_s == 0.25
    assert line.due == [1, 1, 0, 0]
    assert line.ended == [0, 0, 1, 1]
    assert line.running == [1, 2, 1, 0]
    assert line.tokens == [1, 2, 1, 1]
    assert line.first_token_max_ms == [pytest.approx(100), pytest.approx(100), None, None]


def test_nothing_at_all() -> None:
    found = figures([])
    assert found.first_token_ms is None
    assert found.tokens_per_s == 0
    assert "error_share" not in summary(found)


# ------------------------------------------------------------------------- results


def _result(found: Level) -> RunResult:
    return RunResult(
        conditions={"command": "run"},
        versions={},
        target={"api": "veneer"},
        load=LOAD,
        partial=False,
        why="",
        levels=[found],
        summary=summary(found),
    )


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    result = _result(figures([record(0, 2.0, [0.1, 0.2], tier="disk", load_s=0.1)]))
    write_result(tmp_path / "a.json", result)
    assert read_result(tmp_path / "a.json") == result
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_files_that_are_no_results(tmp_path: Path) -> None:
    whole = tmp_path / "a.json"
    write_result(whole, _result(figures([record(0, 2.0, [0.1])])))
    file = tmp_path / "b.json"
    cases = {
        whole.read_bytes()[: whole.stat().st_size // 2]: {"cause": "not_whole"},
        b"": {"cause": "not_whole"},
        b'{"kind": "prefix", "summary": {}}': {"cause": "kind", "kind": "prefix"},
        b"[1]": {"cause": "not_whole"},
        whole.read_bytes().replace(b'"format": 1', b'"format": 2'): {
            "cause": "newer",
            "format": "2",
        },
        whole.read_bytes().replace(b'"totals"', b'"sums"'): {"cause": "fields"},
    }
    for content, named in cases.items():
        file.write_bytes(content)
        with refused(BadResult, file=file, **named):
            read_result(file)
    with refused(BadResult, cause="unreadable"):
        read_result(tmp_path / "nowhere.json")


# ------------------------------------------------------------------ server's metrics


async def test_the_servers_own_counts() -> None:
    registry = CollectorRegistry()

    def count(name: str, *labels: str) -> Counter:
        return Counter(f"veneer_{name}", "FAKE", labels, registry=registry)

    Gauge("veneer_num_requests_running", "FAKE", registry=registry)
    Gauge("veneer_num_requests_waiting", "FAKE", registry=registry)
    resident = Gauge("veneer_adapters_resident", "FAKE", ["tier"], registry=registry)
    requests = count("requests", "finish_reason")
    prompt, tokens = count("prompt_tokens"), count("generation_tokens")
    lookups = count("adapter_cache_lookups", "tier", "result")
    requests.labels("stop").inc(100)  # of before
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    try:
        async with MetricsWatch(f"127.0.0.1:{server.server_port}") as watch:
            requests.labels("stop").inc(2)
            requests.labels("length").inc(3)
            prompt.inc(50)
            tokens.inc(30)
            lookups.labels("device", "hit").inc(4)
            resident.labels("device").set(2)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    client = Totals(requests=5, prompt_tokens=50, tokens=30)
    counts = watch.counts(client, comparable=True)
    assert counts is not None
    assert (counts.requests, counts.prompt_tokens, counts.tokens) == (5, 50, 30)
    assert counts.agrees is True
    assert counts.lookups == {"device hit": 4}
    other = watch.counts(Totals(requests=5, prompt_tokens=50, tokens=29), comparable=True)
    assert other is not None
    assert other.agrees is False
    residency = watch.residency(0.0)
    assert residency.adapters["device"][0] == 0
    assert residency.adapters["device"][-1] == 2


async def test_no_metrics_there() -> None:
    with refused(TargetFailed, field="--metrics"):
        async with MetricsWatch(f"127.0.0.1:{free_port()}"):
            pass
