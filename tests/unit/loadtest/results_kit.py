"""Small results, made by hand."""

from __future__ import annotations

from typing import Any

from veneer_loadtest.load.spec import AdapterMix, Lengths, LoadSpec, Open
from veneer_loadtest.results import (
    AdapterLoad,
    AnswersGate,
    CaseFigures,
    ChurnFigures,
    CompareLevel,
    CompareResult,
    Distribution,
    Ends,
    FigureRange,
    FindMaxResult,
    GeneratorFigures,
    Level,
    Probe,
    Ratio,
    ReferenceGate,
    Requests,
    RequestSplit,
    RoundFigures,
    RunResult,
    ServerCounts,
    SloFigures,
    SloLimits,
    Spread,
    SwapResult,
    SystemFacts,
    SystemFigures,
    TierShares,
    Timeline,
    Totals,
)
from veneer_loadtest.swap import summary

CONDITIONS: dict[str, Any] = {
    "time": "2026-01-02T03:04:05+00:00",
    "command": "veneer-loadtest run --spawn",
    "python": "3.11.7",
    "system": "Linux x86_64",
    "cpu": "A Processor",
    "cores": 4,
    "memory_bytes": 8 * 2**30,
    "load_average": [0.1, 0.1, 0.1],
}
LIMITS = SloLimits(ttft_ms=600.0)


def distribution(p50: float, p99: float, count: int = 200) -> Distribution:
    """A distribution that is piecewise linear from half of p50 over p50 to p99."""
    cdf = [(p50 / 2, 0.0), (p50, 0.5), (p99, 0.99), (p99 * 1.1, 1.0)]
    return Distribution(
        count=count,
        mean=p50,
        p50=p50,
        p90=(p50 + p99) / 2,
        p95=p99,
        p99=p99,
        p999=p99,
        max=p99 * 1.1,
        cdf=cdf,
    )


def split(requests: int, p50: float, p99: float) -> RequestSplit:
    return RequestSplit(
        requests=requests,
        failed=0,
        tokens=8 * requests,
        first_token_p50_ms=p50,
        first_token_p99_ms=p99,
        inter_token_p50_ms=20.0,
        inter_token_p99_ms=30.0,
        load_p50_ms=5.0,
    )


def load(adapters: tuple[str, ...] = ("sql", "chat"), warmup_s: float = 1.0) -> LoadSpec:
    return LoadSpec(
        adapters=adapters,
        arrivals=Open(2.0),
        popularity=AdapterMix("zipf", 1.2),
        prompt_tokens=Lengths(16, 64),
        tokens=Lengths(8, 8),
        duration_s=4.0,
        warmup_s=warmup_s,
        requests=0,
        cancel_share=0.0,
        seed=7,
        vocab=1000,
    )


def level(
    adapters: int = 2, *, first: tuple[float, float] = (400.0, 900.0), **own: Any
) -> Level:
    """Five seconds, with waits for adapters from two tiers; ``own`` replaces fields."""
    fields: dict[str, Any] = {
        "adapters": adapters,
        "window_s": 3.0,
        "requests": Requests(ok=30, left=0, failed=0, stopped=0),
        "requests_per_s": 10.0,
        "tokens_per_s": 80.0,
        "prompt_tokens_per_s": 60.0,
        "errors": {},
        "first_token_ms": distribution(*first),
        "inter_token_ms": distribution(20.0, 30.0),
        "end_to_end_ms": distribution(9_000.0, 12_000.0),
        "queue_ms": distribution(0.5, 2.0),
        "adapter_load_ms": distribution(0.001, 50.0),
        "by_tier": {"device": split(27, *first), "disk": split(3, first[1], 2 * first[1])},
        "by_adapter": {"sql": split(20, *first), "chat": split(10, *first)},
        "slo": SloFigures(limits=LIMITS, good=27, share=0.9, goodput_per_s=9.0),
        "generator": GeneratorFigures(
            workers=1, cpu_share=0.1, late_p50_ms=0.5, late_p99_ms=2.0, late_max_ms=3.0, lost=0
        ),
        "timeline": timeline(),
        "loads": [AdapterLoad(0.1, "sql", "disk", 40.0), AdapterLoad(2.5, "chat", "host", 4.0)],
        "loads_left_out": 0,
        "residency": TierShares(
            at_s=[-0.5, 0.5, 4.5],
            adapters={"device": [0, 1, 1], "host": [0, 1, 2]},
            bytes={"device": [0, 1_000_000, 1_000_000], "host": [0, 1_000_000, 2_000_000]},
        ),
        "server": ServerCounts(
            requests=30,
            prompt_tokens=900,
            tokens=240,
            agrees=True,
            lookups={"device hit": 27, "device miss": 3},
            evictions={"device capacity": 1, "host capacity": 0},
        ),
        "totals": Totals(requests=30, prompt_tokens=900, tokens=240),
    }
    return Level(**{**fields, **own})


def timeline(failed: int = 0) -> Timeline:
    return Timeline(
        bucket_s=0.5,
        due=[4, 4, 4, 4, 4, 4, 4, 2, 0, 0, 0],
        ended=[0, 2, 4, 4, 4, 4, 4, 4, 2, 1, 1],
        failed=[0, 0, failed, 0, 0, 0, 0, 0, 0, 0, 0],
        tokens=[0, 16, 32, 40, 44, 48, 40, 32, 16, 8, 4],
        running=[4, 6, 6, 6, 6, 6, 6, 4, 2, 1, 0],
        first_token_p50_ms=[
            None,
            300.0,
            400.0,
            420.0,
            380.0,
            400.0,
            410.0,
            700.0,
            None,
            None,
            None,
        ],
        first_token_max_ms=[
            None,
            500.0,
            400.0,
            990.0,
            380.0,
            600.0,
            410.0,
            700.0,
            None,
            None,
            None,
        ],
    )


def run(*levels: Level, **own: Any) -> RunResult:
    fields: dict[str, Any] = {
        "conditions": CONDITIONS,
        "versions": {"veneer": "0.1.0"},
        "target": {"api": "veneer", "device": "cpu"},
        "load": load(),
        "partial": False,
        "why": "",
        "levels": list(levels),
        "summary": {},
    }
    return RunResult(**{**fields, **own})


def find_max(*rates: tuple[float, float], **own: Any) -> FindMaxResult:
    """Probes of (rate, share of good requests); 0.9 of them must be."""
    probes = []
    for rate, good in rates:
        slo = SloFigures(limits=LIMITS, good=9, share=good, goodput_per_s=rate * good)
        figures = level(first=(100 * rate, 200 * rate), slo=slo)
        probes.append(Probe(rate=rate, kept=good >= 0.9, level=figures))
    fields: dict[str, Any] = {
        "conditions": CONDITIONS,
        "versions": {},
        "target": {"api": "veneer"},
        "load": load(),
        "limits": LIMITS,
        "share": 0.9,
        "partial": False,
        "why": "",
        "probes": probes,
        "max_rate": max((probe.rate for probe in probes if probe.kept), default=0.0),
        "bounded": any(not probe.kept for probe in probes),
        "summary": {},
    }
    return FindMaxResult(**{**fields, **own})


def spread(p50: float) -> Spread:
    return Spread(p50=p50, p99=2 * p50, low=p50 / 2, high=3 * p50)


def swap(**own: Any) -> SwapResult:
    """TTFT of 70 ms, to which each case adds; two phases of uploads."""
    added = {"same": 0.0, "device": 1.0, "host": 3.0, "disk": 30.0, "disk_cold": 40.0}
    cases = {
        case: CaseFigures(
            first_token_ms=spread(70 + more),
            delta_ms=spread(more),
            load_ms=spread(more),
            samples_ms=[70 + more + n for n in (0, 1, -1) * 4],
        )
        for case, more in {**added, "publish": 90.0}.items()
    }
    churn = ChurnFigures(
        streams=4,
        publishes=28,
        publish_ms=spread(200),
        quiet_ms=spread(40),
        inside_ms=spread(44),
        outside_ms=spread(41),
        quiet_gaps=1000,
        inside_gaps=300,
        longest_ms=132,
        steps=3.3,
    )
    fields: dict[str, Any] = {
        "conditions": CONDITIONS,
        "versions": {"veneer": "0.1.0"},
        "target": {"api": "veneer"},
        "workload": {
            "rank": 16,
            "adapter_bytes": 9_800_000,
            "prompt_tokens": 40,
            "samples": 12,
            "threads": 2,
            "seed": 1,
        },
        "cases": cases,
        "churn": churn,
        "partial": False,
        "why": "",
        "summary": summary(cases, churn),
    }
    return SwapResult(**{**fields, **own})


def compare(**own: Any) -> CompareResult:
    """Three systems at one and eight streams; the last is as fast as Veneer at one."""
    levels = []
    for streams, rates in ((1, (40.0, 20.0, 41.0)), (8, (96.0, 40.0, 48.0))):
        systems = {
            name: SystemFigures(
                tokens_per_s=FigureRange(median=rate, low=rate - 2, high=rate + 2),
                first_token_ms=Ends(p50=1e4 / rate, p99=2e4 / rate),
                inter_token_ms=Ends(p50=1e3 / rate, p99=3e3 / rate),
                client_cpu_share=0.1,
                rounds=[RoundFigures(wall_s=1.0, tokens=640)] * 2,
            )
            for name, rate in zip(("veneer", "peft", "llama-server"), rates, strict=True)
        }
        ratios = {
            name: Ratio(
                ratio=rates[0] / rate,
                low=rates[0] / rate - 0.1,
                high=rates[0] / rate + 0.1,
                ranges_overlap=abs(rates[0] - rate) < 4,
            )
            for name, rate in zip(("peft", "llama-server"), rates[1:], strict=True)
        }
        levels.append(CompareLevel(streams=streams, systems=systems, ratios=ratios))
    fields: dict[str, Any] = {
        "conditions": CONDITIONS,
        "versions": {},
        "workload": {"adapters": ["a", "b"], "tokens": 64},
        "systems": {
            name: SystemFacts(command=f"{name} --threads 2", versions={name: "1"}, device="cpu")
            for name in ("veneer", "peft", "llama-server")
        },
        "gate": ReferenceGate(
            tokens=100, mean=0.07, p99=0.4, worst=1.0, mean_bound=0.2, p99_bound=1.0,
            other_adapter_mean=1.2, regret=0.01, regret_bound=0.1, other_adapter_regret=0.5,
            answers=2,
        ),
        "peer_gates": {
            "llama-server": AnswersGate(answers=2, own_best=2, regret=0.2, other_regret=0.4)
        },
        "partial": False,
        "why": "",
        "levels": levels,
        "summary": {},
    }  # fmt: skip
    return CompareResult(**{**fields, **own})
