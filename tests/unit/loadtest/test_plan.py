"""What a load consists of: options as texts, arrivals, popularity, lengths, traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import islice, pairwise
from pathlib import Path

import msgspec
import numpy as np
import pytest
from veneer_loadtest.errors import BadOption, BadTrace
from veneer_loadtest.load.plan import Planned, plan, prompt_ids, prompt_text
from veneer_loadtest.load.spec import (
    AdapterMix,
    Arrivals,
    Closed,
    Lengths,
    LoadSpec,
    Open,
    Traced,
    parse_arrivals,
    parse_lengths,
    parse_popularity,
)
from veneer_loadtest.load.summary import parse_limit, parse_seconds, parse_slo
from veneer_loadtest.load.trace import TraceLine, read_trace

from tests.refused import refused

ADAPTERS = tuple(f"a{i}" for i in range(10))
SEED = 7
MANY = 20_000


FOUR = Closed(4)


def load(arrivals: Arrivals = FOUR, popularity: str = "uniform", **more: object) -> LoadSpec:
    return LoadSpec(
        **{  # type: ignore[arg-type]
            "adapters": ADAPTERS,
            "arrivals": arrivals,
            "popularity": parse_popularity(popularity),
            "prompt_tokens": Lengths(16, 64),
            "tokens": Lengths(8, 8),
            "duration_s": 0.0,
            "warmup_s": 0.0,
            "requests": 0,
            "cancel_share": 0.0,
            "seed": SEED,
            "vocab": 5000,
            **more,
        }
    )


def first(spec: LoadSpec, count: int) -> list[Planned]:
    print(f"seed {spec.seed}")
    return list(islice(plan(spec), count))


@pytest.mark.parametrize(
    ("cv", "arrivals"), [(1.0, "poisson"), (4.0, "gamma:4"), (0.0, "constant")]
)
def test_arrivals_have_the_rate_and_spread_asked_for(cv: float, arrivals: str) -> None:
    arriving = parse_arrivals(rate=20.0, streams=None, arrivals=arrivals, trace=None, speed=1)
    requests = first(load(arriving), MANY)
    gaps = np.array([b.at_s - a.at_s for a, b in pairwise(requests)])
    # Standard error of the mean: cv / sqrt(20,000), so 5 of them is 14 % at cv 4.
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05 if cv <= 1 else 0.15)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=1e-6)


def test_open_loop_ends_with_its_duration_and_requests() -> None:
    requests = list(plan(load(Open(10.0, 0.0), duration_s=2.0)))
    assert [round(r.at_s, 6) for r in requests] == [round(0.1 * i, 6) for i in range(1, 20)]
    assert len(list(plan(load(Open(10.0), duration_s=50.0, requests=30)))) == 30
    assert len(list(plan(load(Closed(2), requests=5)))) == 5


def shares(popularity: str, count: int = MANY) -> list[float]:
    asked = Counter(r.adapter for r in first(load(popularity=popularity), count))
    return [asked[name] / count for name in ADAPTERS]


def test_popularity_is_what_its_name_says() -> None:
    near = pytest.approx  # 20,000 draws: a share's standard error is below 0.4 %
    assert shares("identical") == [1.0, *[0.0] * 9]
    assert shares("uniform") == near([0.1] * 10, abs=0.02)
    total = sum(1 / k**1.5 for k in range(1, 11))
    assert shares("zipf:1.5") == near([1 / k**1.5 / total for k in range(1, 11)], abs=0.02)
    # S-LoRA's: adapter floor(n * U^(1/a)), so the share below k is (k / n)^a.
    assert np.cumsum(shares("powerlaw:0.5")) == near(
        [(k / 10) ** 0.5 for k in range(1, 11)], abs=0.02
    )
    assert shares("roundrobin", 1000) == [0.1] * 10
    assert shares("distinct", 1000) == [0.1] * 10


def test_distinct_asks_for_each_once_in_a_cycle_of_its_own_order() -> None:
    asked = [r.adapter for r in first(load(popularity="distinct"), 30)]
    cycles = [asked[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(cycle) == sorted(ADAPTERS) for cycle in cycles)
    assert cycles[0] != cycles[1]
    assert [r.adapter for r in first(load(popularity="roundrobin"), 10)] == list(ADAPTERS)


def test_lengths() -> None:
    lengths = [r.prompt_tokens for r in first(load(), MANY)]
    assert (min(lengths), max(lengths)) == (16, 64)
    assert np.mean(lengths) == pytest.approx(40, rel=0.02)
    spread = parse_lengths("--tokens", "lognormal:200:1:100000")
    lengths = [r.tokens for r in first(load(tokens=spread), MANY)]
    assert np.mean(lengths) == pytest.approx(200, rel=0.05)
    assert np.std(lengths) / np.mean(lengths) == pytest.approx(1, rel=0.1)
    assert max(r.tokens for r in first(load(tokens=Lengths(1, 300, 200.0, 1.0)), 1000)) == 300


def test_callers_leave_as_often_as_asked_and_before_the_end() -> None:
    requests = first(load(cancel_share=0.25), MANY)
    leave = [r.leave_after for r in requests if r.leave_after is not None]
    assert len(leave) / MANY == pytest.approx(0.25, abs=0.02)
    assert set(leave) == set(range(8)), "after 0 to all but one of 8 tokens"
    assert all(r.leave_after is None for r in first(load(), 1000))


def test_the_same_load_whoever_reads_it() -> None:
    spec = load(Open(5.0), "zipf:1", cancel_share=0.5)
    again = msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=LoadSpec)
    assert first(spec, 2000) == first(again, 2000)
    assert first(spec, 100) == first(spec, 2000)[:100]
    assert first(spec, 100) != first(msgspec.structs.replace(spec, seed=8), 100)


def test_prompts() -> None:
    one, two = first(load(), 2)
    ids = prompt_ids(load(), one)
    assert len(ids) == one.prompt_tokens
    assert all(1000 <= i < 5000 for i in ids)
    assert ids == prompt_ids(load(), one)
    assert ids[:4] != prompt_ids(load(), two)[:4]
    assert len(prompt_text(load(), one).split()) == one.prompt_tokens
    assert prompt_text(load(), Planned(0, 0.0, "", 0, 1, prompt="Own text")) == "Own text"


# -------------------------------------------------------------------------- traces


def test_trace_is_replayed_in_order_and_faster(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"at_s": 4, "adapter": "b", "prompt_tokens": 7, "tokens": 3}\n\n'
        '{"at_s": 1.0, "tokens": 2, "prompt": "Hello"}\n'
    )
    assert list(plan(load(Traced(str(trace), 2.0)))) == [
        Planned(0, 0.5, "", 0, 2, prompt="Hello"),
        Planned(1, 2.0, "b", 7, 3),
    ]


@pytest.mark.parametrize(
    ("text", "named", "field"),
    [
        ("", {"cause": "empty"}, ""),
        ("\n\n", {"cause": "empty"}, ""),
        ('{"at_s": 0, "tokens": 1, "prompt_tokens": 1}\n{"at_s": 1, "tok', {"line": 2}, ""),
        ('{"tokens": 1, "prompt_tokens": 1}', {"line": 1}, "`at_s`"),
        ('{"at_s": -1, "tokens": 1, "prompt_tokens": 1}', {"line": 1}, "`at_s`"),
        ('{"at_s": 1, "tokens": 0, "prompt_tokens": 1}', {"line": 1}, "`tokens`"),
        ('{"at_s": 1, "tokens": 1}', {"line": 1}, "`prompt_tokens`"),
        ('{"at_s": 1, "tokens": 1, "prompt_tokens": 1, "when": 2}', {"line": 1}, "`when`"),
        ("\xff", {"line": 1}, ""),
    ],
)
def test_bad_traces_name_the_line_and_the_field(
    tmp_path: Path, text: str, named: Mapping[str, object], field: str
) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(text.encode("latin-1"))
    with refused(BadTrace, file=trace, **named) as caught:
        list(plan(load(Traced(str(trace)))))
    assert field in caught.value.message


def test_a_trace_as_csv(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text('tokens,at_s,adapter,prompt_tokens\n3,4,"b",7\n\n2,1.5,,9\n')
    assert read_trace(trace) == (TraceLine(1.5, 2, "", 9), TraceLine(4.0, 3, "b", 7))


@pytest.mark.parametrize("zone", ["", "+00:00"])
def test_a_trace_with_azures_columns_starts_at_its_earliest_time(
    tmp_path: Path, zone: str
) -> None:
    trace = tmp_path / "azure.csv"
    trace.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
        f"2023-11-16 18:17:04.2500000{zone},4808,10\r\n"
        f"2023-11-16 18:17:03.9799600{zone},110,27\r\n"
    )
    first, second = read_trace(trace)
    assert (first.at_s, first.prompt_tokens, first.tokens) == (0.0, 110, 27)
    assert second.at_s == pytest.approx(0.27004, abs=1e-5)
    assert (second.prompt_tokens, second.tokens, second.adapter) == (4808, 10, "")


@pytest.mark.parametrize(
    ("text", "line", "named"),
    [
        ("at_s,prompt_tokens,tokens\n0,1,1\n1,2\n", 3, "3 columns"),
        ("at_s,prompt_tokens,tokens\n0,1,1\n1,2,x\n", 3, "$.tokens"),
        ("at_s,prompt_tokens,tokens\n\nnan,1,1\n", 3, "`at_s`"),
        ("at_s,prompt_tokens\n0,1\n", 1, "`tokens`"),
        ("at_s,prompt_tokens,tokens,model\n0,1,1,a\n", 1, "`model`"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,1,1\n", 2, "2023-11-16 18:17:03.979"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,1,0\n",
            2,
            "`GeneratedTokens` must be 1 or more",
        ),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03,many,1\n",
            2,
            "`ContextTokens`",
        ),
    ],
)
def test_a_bad_row_of_a_csv_trace_names_its_line_and_the_column_as_written(
    tmp_path: Path, text: str, line: int, named: str
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(text)
    with refused(BadTrace, file=trace, line=line) as caught:
        read_trace(trace)
    assert named in caught.value.message


def test_a_trace_that_is_not_there() -> None:
    with refused(BadTrace, file="nowhere.jsonl", cause="unreadable"):
        list(plan(load(Traced("nowhere.jsonl"))))


# ------------------------------------------------------------------------- options

ONE_OF = {"one_of": "--rate --streams --trace"}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ONE_OF),
        ({"rate": 1.0, "streams": 2}, ONE_OF),
        ({"streams": 0}, {"field": "--streams"}),
        ({"rate": 0.0}, {"field": "--rate"}),
        ({"rate": float("inf")}, {"field": "--rate"}),
        ({"rate": 1.0, "arrivals": "gamma"}, {"field": "--arrivals"}),
        ({"rate": 1.0, "arrivals": "poisson:2"}, {"field": "--arrivals"}),
        ({"rate": 1.0, "arrivals": "gamma:nan"}, {"field": "--arrivals"}),
        ({"trace": "t", "speed": 0.0}, {"field": "--speed"}),
    ],
)
def test_bad_arrivals(options: dict[str, object], named: Mapping[str, object]) -> None:
    given = {"rate": None, "streams": None, "arrivals": "poisson", "trace": None, "speed": 1.0}
    with refused(BadOption, **named):
        parse_arrivals(**{**given, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["zipf:0", "zipf:-1", "zipf:x", "often", "uniform:2", "zipf:inf"]
)
def test_bad_popularity(text: str) -> None:
    with refused(BadOption, field="--popularity"):
        parse_popularity(text)


def test_popularity_as_text() -> None:
    for text in ("identical", "zipf:1.2", "powerlaw:0.5"):
        assert str(parse_popularity(text)) == text
    assert parse_popularity("zipf") == AdapterMix("zipf", 1.0)


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "9..3",
        "..",
        "4..",
        "-1",
        "1.5",
        "lognormal:1:1",
        "lognormal:0:1:9",
        "lognormal:9:1:3",
    ],
)
def test_bad_lengths(text: str) -> None:
    with refused(BadOption, field="--tokens"):
        parse_lengths("--tokens", text)


def test_lengths_as_text() -> None:
    for text in ("64", "16..64", "lognormal:200:1:1000"):
        assert str(parse_lengths("--tokens", text)) == text


def test_times_limits_and_goals() -> None:
    assert [parse_seconds("--x", t) for t in ("500ms", "30s", "5m", "1h", "7")] == [
        0.5,
        30,
        300,
        3600,
        7,
    ]
    for bad in ("", "s", "1.2.3s", "5 weeks", "-1s"):
        with refused(BadOption, field="--x"):
            parse_seconds("--x", bad)
    limits = parse_slo("ttft=500ms, tpot=50ms")
    assert (limits.ttft_ms, limits.tpot_ms, limits.e2e_ms) == (500, 50, None)
    with refused(BadOption, field="--slo"):
        parse_slo("p99=1s")
    limit = parse_limit("first_token_p99_ms > 2e3")
    assert limit.holds({"first_token_p99_ms": 2001})
    assert not limit.holds({"first_token_p99_ms": 2000})
    assert limit.holds({}), "nothing measured is no success"
    for bad in ("tokens_per_s", "tokens_per_s=1", "speed>1", "tokens_per_s<"):
        with refused(BadOption, field="--fail-if"):
            parse_limit(bad)
