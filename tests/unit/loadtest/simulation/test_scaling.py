"""Autoscaling: the rules of both policies, and a cluster whose load rises and falls."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.trace import TraceLine
from veneer_loadtest.simulation import cluster, command, scaling
from veneer_loadtest.simulation.cluster import simulate
from veneer_loadtest.simulation.costs import Costs, write_costs
from veneer_loadtest.simulation.figures import Figures, FleetSize, ScalingFigures
from veneer_loadtest.simulation.scaling import (
    Autoscaler,
    EngineLoad,
    HpaAutoscaler,
    RayAutoscaler,
)
from veneer_loadtest.simulation.scenario import Partition, ReplicaKind, Scaling, Scenario, Slo

from tests.planted import planted
from tests.refused import refused

IDLE, BUSY = EngineLoad(0.0, 0.1), EngineLoad(20.0, 0.9)


def drive(
    scaler: Autoscaler, ready: int, target: int, load: EngineLoad, seconds: range
) -> list[int]:
    """Return the decisions in these seconds, with this load on all ready replicas. Replicas are
    removed at once, and none becomes ready."""
    decisions = []
    for now in seconds:
        if now % scaler.sample_s == 0:
            for number in range(ready):
                scaler.sample(f"{number}", load, float(now))
        if now % scaler.decide_s == 0:
            target = scaler.decide(target, float(now))
            decisions.append(target)
            while ready > target:
                ready -= 1
                scaler.forget(f"{ready}")
    return decisions


def test_ray_adds_after_ten_seconds_and_removes_one_after_five_minutes() -> None:
    # At most twice as many, however many wait.
    assert drive(RayAutoscaler(2, 8), 2, 2, BUSY, range(2, 41)) == [2, 4, 4, 4]
    quiet = drive(RayAutoscaler(2, 8), 4, 4, IDLE, range(2, 700))
    assert quiet == [4] * 30 + [3] * 31 + [2] * 8


def test_ray_waits_again_if_the_load_comes_back() -> None:
    scaler = RayAutoscaler(1, 8)
    drive(scaler, 2, 2, IDLE, range(2, 290))
    drive(scaler, 2, 2, EngineLoad(1.5, 0.6), range(290, 340))
    assert drive(scaler, 2, 2, IDLE, range(340, 600))[-1] == 2


def test_the_hpa_adds_by_the_queue_alone_and_removes_after_ten_quiet_minutes() -> None:
    scaler = HpaAutoscaler(2, 20)
    assert drive(scaler, 2, 2, EngineLoad(8.0, 0.0), range(15, 16)) == [4]
    # Two that start count as idle, so the mean is 4, the target.
    assert drive(scaler, 2, 4, EngineLoad(8.0, 0.0), range(30, 100)) == [4] * 5
    assert drive(HpaAutoscaler(2, 20), 2, 2, EngineLoad(0.0, 1.0), range(15, 100))[-1] == 2
    # At most four more, or twice as many, at once.
    assert drive(HpaAutoscaler(2, 20), 2, 2, EngineLoad(90.0, 0.0), range(15, 16)) == [6]
    quiet = HpaAutoscaler(2, 20)
    assert drive(quiet, 6, 6, EngineLoad(4.2, 0.0), range(15, 100)) == [6] * 6
    after = drive(quiet, 6, 6, IDLE, range(105, 900))
    assert after == sorted(after, reverse=True)
    assert after[-1] == 2
    # Until 90 s six were enough; the decision at 690 s is the first that does not see that.
    assert after.count(6) == len(range(105, 690, 15))


# ------------------------------------------------------------------ a cluster

COSTS = Costs(step_s=24e-3, row_s=4.8e-3, prompt_token_s=1e-3)
COLD_S = 20.0


def rising_and_falling() -> tuple[TraceLine, ...]:
    """A request a second for 30 s, then 9 for 60 s, then one in 4 s, evenly."""
    lines, at = [], 0.0
    for rate, end in ((1.0, 30.0), (9.0, 90.0), (0.25, 800.0)):
        while at < end:
            lines.append(TraceLine(at, 16, "", 48))
            at += 1 / rate
    return tuple(lines)


SCENARIO = Scenario(
    trace=rising_and_falling(),
    warm=0.0,
    replicas=1,
    price=0.5,
    on_disk=16,
    max_queue=1000,
    scaling=Scaling("ray", 3, COLD_S, Slo(ttft_s=1.0)),
)


@functools.cache
def run(scenario: Scenario) -> Figures:
    return simulate(scenario, "adapter", COSTS)


def scaled(found: Figures) -> ScalingFigures:
    assert found.scaling is not None
    return found.scaling


def area(sizes: list[FleetSize], end: float) -> float:
    """Replica seconds, counted from the sizes."""
    ends = [size.at_s for size in sizes[1:]] + [end]
    return sum(
        (size.ready + size.starting + size.draining) * (until - size.at_s)
        for size, until in zip(sizes, ends, strict=True)
    )


def check(found: Figures) -> None:
    sizes = scaled(found).sizes
    assert found.answered == len(SCENARIO.trace), "a replica that is removed loses nothing"
    assert sizes[0] == FleetSize(0.0, 1, 0, 0)
    assert max(size.ready for size in sizes) > 1
    assert sizes[-1].ready == 1
    # Each replica is ready the cold start after the decision.
    began = [
        (b.at_s, b.starting) for a, b in itertools.pairwise(sizes) if b.starting > a.starting
    ]
    ready = {
        b.at_s: b.ready - a.ready for a, b in itertools.pairwise(sizes) if b.ready > a.ready
    }
    assert ready == {at + COLD_S: count for at, count in began}
    # Each is paid from the decision to the end of its last request.
    (kind,) = found.kinds
    assert kind.hours * 3600 == pytest.approx(area(sizes, found.seconds))
    assert found.cost == pytest.approx(0.5 * kind.hours)
    # What was late came while replicas were starting, or just after.
    assert 0 < scaled(found).broken_starting < scaled(found).broken
    # Each new replica began with an empty disk cache.
    replicas = 1 + sum(ready.values())
    assert found.fetched_bytes > replicas * 4 * SCENARIO.adapter_bytes


def test_replicas_follow_the_load_after_a_cold_start_and_lose_nothing() -> None:
    check(run(SCENARIO))
    again = simulate(SCENARIO, "adapter", COSTS)
    assert without_cpu(run(SCENARIO)) == without_cpu(again)
    for module, old, new in (
        (cluster, "self._scenario.scaling.cold_start_s, lambda", "0.0, lambda"),
        (cluster, "site.machine.end = self._events.now", "pass"),
        (
            cluster,
            "machine = self._new_machine(self._scenario.fleet[0])",
            "machine = _Machine(self._scenario.fleet[0], 0.0)",
        ),
        (scaling, "self._UP_S if more else self._DOWN_S", "1e9"),
    ):
        with planted(module, old, new):
            wrong = simulate(SCENARIO, "adapter", COSTS)
        with pytest.raises(AssertionError):
            check(wrong)


def without_cpu(found: Figures) -> Figures:
    return msgspec.structs.replace(found, cpu_s=0.0)


def test_without_a_cold_start_fewer_requests_break_the_slo() -> None:
    assert SCENARIO.scaling is not None
    quick = replace(SCENARIO, scaling=replace(SCENARIO.scaling, cold_start_s=0.0))
    assert scaled(run(quick)).broken < 0.75 * scaled(run(SCENARIO)).broken
    lax = replace(SCENARIO, scaling=replace(SCENARIO.scaling, slo=Slo(itl_s=9.0)))
    assert scaled(run(lax)).broken == 0


def test_a_replica_waits_for_the_registry_before_it_is_ready() -> None:
    away = replace(SCENARIO, on_disk=0, happenings=(Partition(40.0, 200.0),))
    sizes = scaled(run(away)).sizes
    assert max(size.starting for size in sizes) >= 1
    assert min(size.at_s for size in sizes if size.ready > 1) >= 240.0


def test_the_charts_hpa_scales_too() -> None:
    assert SCENARIO.scaling is not None
    sizes = scaled(
        run(replace(SCENARIO, scaling=replace(SCENARIO.scaling, policy="hpa")))
    ).sizes
    assert max(size.ready for size in sizes) > 1
    assert sizes[-1].ready == 1


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("most", {"replicas": 3, "scaling": Scaling("ray", 2)}),
        ("cold_start", {"scaling": Scaling("ray", 4, -1.0)}),
        (
            "autoscale",
            {"kinds": (ReplicaKind("a"), ReplicaKind("b")), "scaling": Scaling("ray", 4)},
        ),
    ],
)
def test_scaling_that_cannot_be_is_refused(field: str, options: dict[str, object]) -> None:
    with refused(BadOption, field=field):
        Scenario(**options)  # type: ignore[arg-type]


def test_the_program_prints_replicas_over_time_and_what_broke_the_slo(tmp_path: Path) -> None:
    trace, costs = tmp_path / "trace.jsonl", tmp_path / "costs.json"
    write_costs(costs, COSTS)
    trace.write_bytes(b"\n".join(map(msgspec.json.encode, SCENARIO.trace)))
    options = ["--trace", str(trace), "--replicas", "1", "--routing", "adapter"]
    options += ["--costs", str(costs)]
    scaled = ["--autoscale", "ray", "--most", "4", "--cold-start", "20"]
    answer = CliRunner().invoke(command.cli, ["run", *options, *scaled, "--slo", "ttft=500ms"])
    assert answer.exit_code == 0, answer.output
    lines = [line.split() for line in answer.output.splitlines()]
    at = lines.index(["at", "s", "ready", "starting", "draining"])
    assert lines[at + 1] == ["0.0", "1", "0", "0"]
    assert any(line[1:3] == ["1", "1"] for line in lines[at + 2 :] if len(line) == 4)
    assert "requests broke the SLO" in answer.output
    for wrong in (["--autoscale", "best"], ["--slo", "ttft=1s"]):
        assert CliRunner().invoke(command.cli, ["run", *options, *wrong]).exit_code == 1
