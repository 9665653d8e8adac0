"""The simulator's parts: clock, loader, traffic, options, costs and their fit, figures."""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_loadtest.errors import BadOption, TargetFailed
from veneer_loadtest.simulation import command
from veneer_loadtest.simulation.costs import Costs, read_costs, write_costs
from veneer_loadtest.simulation.events import Events
from veneer_loadtest.simulation.figures import EndedRequests, jain
from veneer_loadtest.simulation.fit import Measurements, fit
from veneer_loadtest.simulation.happenings import parse_happenings
from veneer_loadtest.simulation.loader import SimulatedLoader
from veneer_loadtest.simulation.options import parse_routings
from veneer_loadtest.simulation.scenario import Drain, Lose, Partition, Publish, Scenario
from veneer_loadtest.simulation.servers import parse_cores
from veneer_loadtest.simulation.traffic import traffic

from tests.refused import refused


def test_events_come_in_order_of_time_and_then_of_their_making() -> None:
    events, seen = Events(), []
    for name, at in (("late", 2.0), ("first", 1.0), ("second", 1.0)):
        events.at(at, lambda name=name: seen.append((name, events.now)))  # type: ignore[misc]
    while events.next is not None:
        events.step()
    assert seen == [("first", 1.0), ("second", 1.0), ("late", 2.0)]


def test_a_loader_takes_one_after_another() -> None:
    loader = SimulatedLoader()
    loader.add("a", 10, 2.0)
    loader.add("b", 20, 3.0)
    assert loader.work(1.5) == []
    assert (loader.left_s, loader.digests) == (0.5, {"a", "b"})
    assert loader.work(1.0) == ["a"]
    assert loader.left_s == 2.5
    assert loader.work(9.0) == ["b"]
    assert not loader
    assert (loader.loaded, loader.loaded_bytes) == (2, 30)


def test_traffic_is_as_described_and_the_same_for_the_same_seed() -> None:
    scenario = Scenario(requests=20_000, rate=100.0, adapters=50, tenants=7, seed=9)
    asked = list(traffic(scenario))
    assert asked == list(traffic(scenario))
    assert [each.number for each in asked] == list(range(20_000))
    assert all(a.at_s <= b.at_s for a, b in itertools.pairwise(asked))
    assert 190 < asked[-1].at_s < 210
    counts = Counter(each.adapter for each in asked)
    share = 1 / sum(1 / (n + 1) for n in range(50))
    assert counts[0] / 20_000 == pytest.approx(share, rel=0.05)
    assert counts[9] / 20_000 == pytest.approx(share / 10, rel=0.15)
    mean = sum(each.prompt_tokens for each in asked) / 20_000
    assert mean == pytest.approx(scenario.prompt_tokens, rel=0.02)
    assert all(each.tenant == each.adapter % 7 for each in asked)


def test_a_burst_is_one_tenants() -> None:
    scenario = Scenario(requests=1000, rate=10.0, burst_share=0.5, burst=(100, 2.0), seed=2)
    asked = list(traffic(scenario))
    assert len(asked) == 1000
    counts = Counter((round(each.at_s / 2), each.tenant) for each in asked)
    assert counts.most_common(1)[0][1] > 40  # 2.5 of each tenant otherwise


@pytest.mark.parametrize(
    ("kind", "text", "found"),
    [
        ("lose", "3@10", Lose(10.0, 3)),
        ("lose", "3@10+5.5", Lose(10.0, 3, 5.5)),
        ("drain", "0@1", Drain(1.0, 0)),
        ("partition", "5+60", Partition(5.0, 60.0)),
        ("publish", "7@0", Publish(0.0, 7)),
    ],
)
def test_happenings_are_read(kind: str, text: str, found: object) -> None:
    assert parse_happenings(kind, [text]) == [found]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("lose", "3"),
        ("lose", "3@"),
        ("lose", "a@1"),
        ("lose", "3@-1"),
        ("drain", "1@2@3"),
        ("partition", "5"),
        ("partition", "nan+1"),
        ("publish", "@"),
        ("publish", ""),
    ],
)
def test_a_happening_that_cannot_be_read_is_refused(kind: str, text: str) -> None:
    with refused(BadOption, field=kind):
        parse_happenings(kind, [text])


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("replicas", {"replicas": 0}),
        ("rate", {"rate": 0.0}),
        ("requests", {"requests": -1}),
        ("burst_share", {"burst_share": 1.0}),
        ("on_disk", {"on_disk": 3, "in_memory": 4}),
        ("prompt_tokens", {"prompt_tokens": 5000}),
        ("replica", {"happenings": (Lose(1.0, 2),)}),
        ("adapter", {"happenings": (Publish(1.0, 64),)}),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(field: str, options: dict[str, object]) -> None:
    with refused(BadOption, field=field):
        Scenario(**options)  # type: ignore[arg-type]


def test_routings_and_cores_are_read_or_refused() -> None:
    assert parse_routings("random, adapter") == ("random", "adapter")
    with refused(BadOption, field="routing"):
        parse_routings("best")
    assert parse_cores("0,1") == (0, 1)
    with refused(BadOption, field="cores"):
        parse_cores("0-1")


def test_costs_go_through_their_file_and_others_are_refused(tmp_path: Path) -> None:
    costs, path = Costs(cpu="a CPU", step_s=0.25), tmp_path / "costs.json"
    write_costs(path, costs)
    assert read_costs(path) == costs
    assert json.loads(path.read_text())["cpu"] == "a CPU"
    for text in ("", "{", '{"step_s": -1}', '{"step_s": 0}', '{"steps": 1}', '{"step_s": "1"}'):
        path.write_text(text)
        with refused(BadOption, field="costs"):
            read_costs(path)
    with refused(BadOption, field="costs"):
        read_costs(tmp_path / "none.json")


def test_a_fit_finds_the_costs_that_made_the_times() -> None:
    measured = Measurements()
    for streams, adapters in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4)):
        measured.apart[streams, adapters] = [6e-3 + streams * 2e-3 + adapters * 1e-3]
    for length in (8, 16, 64):
        measured.first[length] = [4e-3 + 6e-3 + 1e-3 + length * 3e-3]
    measured.load, measured.load_beside = [20e-3], [80e-3]
    found = fit(measured, 1_000_000, "test", Costs())
    assert found.step_s == pytest.approx(6e-3)
    assert found.row_s == pytest.approx(2e-3)
    assert found.adapter_s == pytest.approx(1e-3)
    assert found.prompt_token_s == pytest.approx(3e-3)
    assert found.front_s + found.back_s == pytest.approx(4e-3)
    assert found.of_load(1_000_000) == pytest.approx(20e-3)
    assert found.busy_rate == pytest.approx(0.25)
    assert found.noise == pytest.approx([1.0] * 20)
    assert found.cpu


def test_a_fit_without_some_samples() -> None:
    """On a slow machine streams may not have run together, and on a fast one a stream may have
    ended before a load beside it began."""
    measured = Measurements()
    for streams, adapters in ((1, 1), (2, 1), (2, 2), (4, 1)):
        measured.apart[streams, adapters] = [6e-3 + streams * 2e-3 + adapters * 1e-3]
    measured.apart[4, 4] = []
    for length in (8, 16, 64):
        measured.first[length] = [11e-3 + length * 3e-3]
    measured.load = [20e-3]
    found = fit(measured, 1_000_000, "test", Costs())
    assert found.row_s == pytest.approx(2e-3)
    assert found.busy_rate == 1.0
    measured.apart = defaultdict(list, {(1, 1): [1e-3], (2, 2): []})
    with refused(TargetFailed):
        fit(measured, 1_000_000, "test", Costs())


def test_a_fit_gives_no_negative_cost() -> None:
    measured = Measurements()
    for streams, adapters in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4)):
        measured.apart[streams, adapters] = [9e-3 - adapters * 1e-3]
    for length in (8, 16):
        measured.first[length] = [length * 1e-3]
    measured.load = measured.load_beside = [1e-3]
    found = fit(measured, 1_000_000, "test", Costs())
    assert min(found.step_s, found.row_s, found.adapter_s, found.front_s) >= 0


def test_fairness_is_one_if_all_are_equal_and_a_share_if_one_has_all() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain([]) == 1.0


def test_figures_leave_the_first_requests_out() -> None:
    collected = EndedRequests(1)
    for number, seconds in ((0, 9.0), (1, 1.0), (2, 3.0)):
        collected.sent(number, "a" if number < 2 else "b")
        collected.first_token(number, 0, seconds, hit=number == 1, prompt=4, cached=number)
    figures = collected.figures(
        4,
        routing="adapter",
        loads=0,
        loaded_bytes=0,
        fetched_bytes=0,
        everywhere_s=[],
        seconds=1.0,
    )
    assert (figures.requests, figures.hit_rate, figures.ttft_p50_s) == (2, 0.5, 2.0)
    assert figures.prefix_rate == 3 / 8
    assert figures.balance == 2.0  # of four replicas, two have all


def test_the_program_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = ["run", "--requests", "60", "--routing", "adapter,random", "--publish", "0@1"]
    answer = CliRunner().invoke(command.cli, [*options, "--json", str(path)])
    assert answer.exit_code == 0, answer.output
    result = json.loads(path.read_text())
    assert [run["routing"] for run in result["runs"]] == ["adapter", "random"]
    assert result["scenario"]["happenings"][0]["adapter"] == 0
    assert result["costs"]["step_s"] == Costs().step_s
