"""The search for the replicas that an SLO needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from veneer_loadtest.errors import BadOption, SloMissed
from veneer_loadtest.simulation import command, search
from veneer_loadtest.simulation.cluster import simulate
from veneer_loadtest.simulation.costs import Costs, write_costs
from veneer_loadtest.simulation.figures import Figures
from veneer_loadtest.simulation.options import parse_slo
from veneer_loadtest.simulation.scenario import ReplicaKind, Routing, Scenario, Slo
from veneer_loadtest.simulation.search import SearchResult

from tests.planted import planted
from tests.refused import refused

COSTS = Costs()
BUSY = Scenario(requests=250, rate=45.0, max_queue=16, warm=0.0)
"""One replica refuses requests, two are slow."""


_RUNS: dict[tuple[Scenario, Costs], Figures] = {}


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each scenario is simulated once for all tests here."""

    def cached(scenario: Scenario, routing: Routing, costs: Costs) -> Figures:
        if (scenario, costs) not in _RUNS:
            _RUNS[scenario, costs] = simulate(scenario, routing, costs)
        return _RUNS[scenario, costs]

    monkeypatch.setattr(search, "simulate", cached)


def find(slo: Slo, scenario: Scenario = BUSY, most: int = 6, seeds: int = 2) -> SearchResult:
    kind = ReplicaKind(price=0.5)
    return search.search(scenario, kind, "adapter", COSTS, slo, most=most, seeds=seeds)


@pytest.fixture(scope="module")
def runs() -> dict[int, list[Figures]]:
    """Runs of 1 to 4 replicas with each of two seeds, without the search."""
    return {
        n: [simulate(replace(BUSY, replicas=n, seed=s), "adapter", COSTS) for s in (1, 2)]
        for n in range(1, 5)
    }


def smallest(runs: dict[int, list[Figures]], slo: Slo) -> int:
    """The smallest number whose runs, and those of all larger numbers, keep the SLO."""
    for n in sorted(runs, reverse=True):
        if not all(
            run.ttft_p99_s <= (slo.ttft_s or 1e9)
            and run.itl_p99_s <= (slo.itl_s or 1e9)
            and sum(run.failed.values()) <= slo.refused * BUSY.requests
            for run in runs[n]
        ):
            return n + 1
    return 1


def limits(runs: dict[int, list[Figures]]) -> list[Slo]:
    """SLOs that need another number each, and combinations in which one limit decides."""
    ttft = [max(run.ttft_p99_s for run in runs[n]) for n in range(1, 5)]
    itl = [max(run.itl_p99_s for run in runs[n]) for n in range(1, 5)]
    return [
        Slo(ttft_s=ttft[3], itl_s=9.0),
        Slo(ttft_s=9.0, itl_s=itl[3]),
        Slo(ttft_s=ttft[2]),
        Slo(itl_s=itl[2]),
        Slo(ttft_s=9.0),
        Slo(ttft_s=9.0, refused=0.9),
    ]


def check_found(runs: dict[int, list[Figures]]) -> None:
    found = []
    for slo in limits(runs):
        found.append(find(slo).best.replicas)
        assert found[-1] == smallest(runs, slo), slo
    assert found == [4, 4, 3, 3, 2, 1]


def test_the_smallest_number_is_that_of_trying_all(runs: dict[int, list[Figures]]) -> None:
    check_found(runs)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('found.append(Limited("TTFT p99"', '(Limited("TTFT p99"'),
        ('found.append(Limited("ITL p99"', '(Limited("ITL p99"'),
        (
            'return [*found, Limited("refused", run.refused',
            'return [*found, Limited("refused", 0.0',
        ),
        ("seed=seed", "seed=scenario.seed"),
    ],
)
def test_a_search_that_is_wrong_is_noticed(
    runs: dict[int, list[Figures]], old: str, new: str
) -> None:
    def check() -> None:
        check_found(runs)
        check_edge(runs)

    with planted(search, old, new), pytest.raises((AssertionError, SloMissed)):
        check()


def check_edge(runs: dict[int, list[Figures]]) -> None:
    """With a limit between two seeds' figures of 3 replicas, 3 is told as near the edge."""
    low, high = sorted(run.ttft_p99_s for run in runs[3])
    assert low < high
    found = find(Slo(ttft_s=(low + high) / 2))
    assert found.best.replicas == 4
    assert found.edge.startswith("3 keeps the SLO with 1 of 2 seeds")
    assert f"{low * 1e3:.3g} to {high * 1e3:.3g} ms" in found.edge


def test_a_number_that_some_seeds_keep_is_told_with_its_spread(
    runs: dict[int, list[Figures]],
) -> None:
    check_edge(runs)


def test_a_number_with_little_to_spare_is_told(runs: dict[int, list[Figures]]) -> None:
    worst = max(run.ttft_p99_s for run in runs[4])
    assert "little to spare" in find(Slo(ttft_s=worst * 1.01)).edge
    assert not find(Slo(ttft_s=9.0, refused=0.9)).edge


def test_an_slo_that_no_number_keeps_is_refused_with_what_was_missed() -> None:
    with refused(SloMissed, limit="TTFT p99") as caught:
        find(Slo(ttft_s=1e-3, itl_s=9.0), most=3)
    assert "up to 3 " in caught.value.message
    assert "--most" in caught.value.message


class _Threshold:
    """A fake of `simulate`: so many replicas and more keep TTFT within 1 s, and it takes 5 %
    longer for each that is missing."""

    def __init__(self, needed: int, like: Figures) -> None:
        self._needed, self._like = needed, like

    def __call__(self, scenario: Scenario, routing: Routing, costs: Costs) -> Figures:
        (kind,) = scenario.kinds
        seconds = 1.0 + 0.05 * (self._needed - kind.replicas)
        return msgspec.structs.replace(self._like, ttft_p99_s=seconds, failed={})


def test_each_number_is_found_in_few_trials(
    runs: dict[int, list[Figures]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        for needed in range(1, 101):
            monkeypatch.setattr(search, "simulate", _Threshold(needed, runs[1][0]))
            found = find(Slo(ttft_s=1.0), most=100)
            tried = [trial.replicas for trial in found.trials]
            assert found.best.replicas == needed
            assert len(tried) == len({*tried}) <= 14
            assert {needed, needed - 1} - {0} <= {*tried}

    check()
    with planted(search, "high - low > 1", "high - low > 2"), pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500ms", Slo(ttft_s=0.5)),
        ("itl=0.05, refused=1%", Slo(itl_s=0.05, refused=0.01)),
        ("ttft=2s,itl=100ms,refused=0.5", Slo(2.0, 0.1, 0.5)),
    ],
)
def test_limits_are_read(text: str, slo: Slo) -> None:
    assert parse_slo(text) == slo


@pytest.mark.parametrize("text", ["", "ttft", "tpot=1s", "refused=1%", "ttft=1s,refused=200%"])
def test_limits_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(BadOption):
        parse_slo(text)


def test_the_program_prints_what_it_tried_and_names_the_cheapest_kind(tmp_path: Path) -> None:
    fast, out = tmp_path / "fast.json", tmp_path / "found.json"
    cheap = Costs(step_s=2e-3, row_s=4e-4, prompt_token_s=1e-4, load_byte_s=1e-10)
    write_costs(fast, cheap)
    load = ["--requests", "200", "--rate", "40", "--seeds", "1", "--warm", "0"]
    kinds = ["--kind", "small,price=0.2", "--kind", f"large,price=2,costs={fast}"]
    answer = CliRunner().invoke(
        command.cli, ["search", "--slo", "ttft=300ms", *load, *kinds, "--json", str(out)]
    )
    assert answer.exit_code == 0, answer.output
    found = {each["kind"]: each for each in json.loads(out.read_text())["search"]}
    number = found["small"]["best"]["replicas"]
    assert number > 1 == found["large"]["best"]["replicas"]
    assert f"cheapest: {number} of small, {number * 0.2:.4g} per hour" in answer.output
    for trial in found["small"]["trials"]:
        assert any(
            line.split()[:4] == [str(trial["replicas"]), str(trial["kept"]), "of", "1"]
            for line in answer.output.splitlines()
        )


def test_the_program_fails_if_no_number_keeps_the_slo() -> None:
    load = ["--requests", "60", "--most", "2", "--seeds", "1"]
    answer = CliRunner().invoke(command.cli, ["search", "--slo", "ttft=1ms", *load])
    assert answer.exit_code == 1
    assert "no number of replicas up to 2 keeps TTFT p99 1 ms" in " ".join(
        answer.output.split()
    )
