"""Mixed ranks, kinds of replicas and their prices, and the queue that refuses requests."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from veneer_loadtest.errors import BadOption
from veneer_loadtest.simulation import cluster, command, costs, figures, traffic
from veneer_loadtest.simulation.cluster import simulate
from veneer_loadtest.simulation.costs import Costs, write_costs
from veneer_loadtest.simulation.figures import Figures
from veneer_loadtest.simulation.options import parse_kind, parse_ranks
from veneer_loadtest.simulation.scenario import ReplicaKind, Scenario
from veneer_loadtest.simulation.traffic import adapter_sizes
from veneer_server.wire.messages import AdapterSource, token_work

from tests.planted import planted
from tests.refused import refused

COSTS = Costs(
    front_s=0.0,
    back_s=0.0,
    step_s=5e-3,
    row_s=1e-3,
    prompt_token_s=1e-3,
    attention_s=0.0,
    adapter_s=1e-3,
    load_s=2e-3,
    load_byte_s=1e-9,
    busy_slowdown=0.0,
    base_parameters=1_000_000,
)
SMALL = Scenario(requests=300, rate=20.0, warm=0.0, seed=3)


def run(scenario: Scenario, known: Costs = COSTS) -> Figures:
    return simulate(scenario, "adapter", known)


# ------------------------------------------------------------------ ranks


def test_ranks_have_their_shares_whatever_the_seed() -> None:
    scenario = Scenario(adapters=40, ranks=((8, 6.0), (16, 3.0), (64, 1.0)), rank_bytes=1000)
    counts = Counter(adapter_sizes(scenario))
    assert counts == {8000: 24, 16_000: 12, 64_000: 4}
    other = adapter_sizes(replace(scenario, seed=2))
    assert Counter(other) == counts
    assert adapter_sizes(scenario) == adapter_sizes(scenario) != other


def lone(rank: int) -> Figures:
    """One request, of 20 prompt tokens to be exact, under an adapter of this rank."""
    one = replace(SMALL, requests=1, adapters=1, prompt_tokens=20, answer_tokens=20)
    return run(replace(one, ranks=((rank, 1.0),), rank_bytes=20_000))


def check_rank() -> None:
    """A rank's load takes its bytes, and its tokens count as the server counts them."""
    small, large = lone(4), lone(100)
    assert (small.loaded_bytes, large.loaded_bytes) == (80_000, 2_000_000)
    source = AdapterSource("digest", "", 2_000_000 // 2, "name")
    work = token_work(source, COSTS.base_parameters)
    assert work == pytest.approx(1 + 2 * (1 - 1 / 6))
    fixed = COSTS.step_s + COSTS.adapter_s
    tokens_s = small.ttft_p50_s - fixed - COSTS.of_load(80_000)
    assert large.ttft_p50_s == pytest.approx(fixed + COSTS.of_load(2_000_000) + work * tokens_s)
    assert small.itl_p50_s == pytest.approx(fixed + COSTS.row_s)
    assert large.itl_p50_s == pytest.approx(fixed + work * COSTS.row_s, abs=1e-5)


def test_a_rank_costs_what_the_server_counts() -> None:
    check_rank()
    for module, old, new in (
        (costs, "count * each * planned.work", "count * each"),
        (traffic, "(ranks * scenario.rank_bytes)", "(0 * ranks + 8 * scenario.rank_bytes)"),
    ):
        with planted(module, old, new), pytest.raises(AssertionError):
            check_rank()


def test_memory_and_disk_hold_fewer_large_adapters() -> None:
    """Room is for so many adapters of average size: of the sizes 6, 1, 1 ... six times their
    mean of 1.5 does not hold all, so some are fetched again."""
    ten = replace(SMALL, replicas=1, adapters=10, in_memory=10, on_disk=10)
    ranks = ((1, 9.0), (6, 1.0))
    all_fit = run(replace(ten, ranks=ranks), Costs())
    assert (all_fit.loads, all_fit.fetched_bytes) == (10, 15 * 610_560)
    tight = run(replace(ten, in_memory=6, on_disk=6, ranks=ranks), Costs())
    assert tight.loads > 10
    assert tight.fetched_bytes > 15 * 610_560


def test_an_adapter_that_fits_nowhere_is_refused() -> None:
    with refused(BadOption, field="in_memory") as caught:
        run(replace(SMALL, in_memory=2, ranks=((1, 63.0), (64, 1.0))))
    assert "give 33 or more" in caught.value.message


# ------------------------------------------------------------------ kinds and prices

FAST = msgspec.structs.replace(COSTS, step_s=1e-3, row_s=2e-4, prompt_token_s=2e-4)
MIXED = replace(
    SMALL,
    requests=150,
    kinds=(
        ReplicaKind("slow", 2, price=0.4),
        ReplicaKind("fast", 1, price=3.0, costs=FAST),
    ),
)


def check_prices() -> None:
    found = run(MIXED)
    slow, fast = found.kinds
    assert (slow.name, fast.name) == ("slow", "fast")
    assert slow.requests + fast.requests == 150
    assert fast.ttft_p99_s < slow.ttft_p99_s / 2
    hours = found.seconds / 3600
    assert (slow.hours, fast.hours) == pytest.approx((2 * hours, hours))
    assert found.cost == pytest.approx(0.4 * 2 * hours + 3.0 * hours)
    tokens = sum(each.prompt_tokens + each.answer_tokens for each in traffic.traffic(MIXED))
    assert slow.tokens + fast.tokens == tokens
    assert found.cost_per_million == pytest.approx(found.cost / tokens * 1e6)
    assert fast.cost_per_million == pytest.approx(3.0 * hours / fast.tokens * 1e6)


def test_a_kind_has_its_own_costs_and_price() -> None:
    check_prices()
    for module, old, new in (
        (cluster, "machine.kind.name == kind.name", "True"),
        (cluster, "kind.costs or self._costs", "self._costs"),
        (figures, "cost=hours * price", "cost=price"),
        (figures, "self._kinds[kind].tokens += tokens", "self._kinds[kind].tokens += 1"),
    ):
        with planted(module, old, new), pytest.raises(AssertionError):
            check_prices()


def test_kinds_of_the_same_costs_are_like_one_kind() -> None:
    few = replace(SMALL, requests=150)
    one = run(replace(few, replicas=3))
    two = run(replace(few, kinds=(ReplicaKind("a", 2), ReplicaKind("b", 1))))
    assert one.cost == two.cost == 0.0
    assert one.ttft_p99_s == two.ttft_p99_s
    assert one.loads == two.loads


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("a", ReplicaKind("a")),
        ("a,replicas=3,price=0.5", ReplicaKind("a", 3, 0.5)),
        ("a, in-memory=4, kv-tokens=512", ReplicaKind("a", in_memory=4, kv_tokens=512)),
    ],
)
def test_kinds_are_read(text: str, kind: ReplicaKind) -> None:
    assert parse_kind(text) == kind


@pytest.mark.parametrize("text", ["", "replicas=3", "a,gpu=1", "a,price=low", "a,replicas"])
def test_a_kind_that_cannot_be_read_is_refused(text: str) -> None:
    with refused(BadOption, field="kind"):
        parse_kind(text)


@pytest.mark.parametrize("text", ["", "8", "8:1,16", "8:x", "8:1:2"])
def test_ranks_that_cannot_be_read_are_refused(text: str) -> None:
    with refused(BadOption, field="ranks"):
        parse_ranks(text)


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("ranks", {"ranks": ((0, 1.0),)}),
        ("ranks", {"ranks": ((8, 0.0),)}),
        ("kind", {"kinds": (ReplicaKind("a"), ReplicaKind("a"))}),
        ("kind", {"kinds": (ReplicaKind("a", 0),)}),
        ("kind", {"kinds": (ReplicaKind("a", 1, -1.0),)}),
        ("max_queue", {"max_queue": -1}),
    ],
)
def test_a_fleet_that_cannot_be_is_refused(field: str, options: dict[str, object]) -> None:
    with refused(BadOption, field=field):
        Scenario(**options)  # type: ignore[arg-type]


def test_the_program_reports_each_kind(tmp_path: Path) -> None:
    fast = tmp_path / "fast.json"
    write_costs(fast, FAST)
    kinds = ["--kind", "slow,replicas=2,price=0.4", "--kind", f"fast,price=3,costs={fast}"]
    options = ["run", "--requests", "60", "--routing", "adapter", *kinds]
    answer = CliRunner().invoke(command.cli, [*options, "--ranks", "8:3,64:1"])
    assert answer.exit_code == 0, answer.output
    rows = {line.split()[0]: line.split() for line in answer.output.splitlines() if line}
    assert len(rows["slow"]) == len(rows["fast"]) == 6
    answer = CliRunner().invoke(command.cli, [*options, "--replicas", "3"])
    assert answer.exit_code == 1


# ------------------------------------------------------------------ the queue


def test_a_full_queue_refuses_and_a_tenants_burst_makes_room_for_others() -> None:
    """The queue is the server's own: with 64 running and 4 waiting, most of 300 at once are
    refused, and waiting requests of the tenant that has most make room for others'."""
    at_once = replace(SMALL, replicas=1, rate=10_000.0, tenants=8, max_queue=4)
    found = run(at_once)
    assert set(found.failed) == {"queue_full", "displaced"}
    assert found.answered + sum(found.failed.values()) == 300
    assert 64 <= found.answered <= 120
    assert found.refused == pytest.approx(1 - found.answered / 300)
    assert not run(replace(at_once, max_queue=300)).failed
