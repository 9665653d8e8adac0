"""Replay of a trace in the simulation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from veneer_loadtest.errors import BadOption
from veneer_loadtest.load.trace import TraceLine
from veneer_loadtest.simulation import command
from veneer_loadtest.simulation.cluster import simulate
from veneer_loadtest.simulation.costs import Costs
from veneer_loadtest.simulation.scenario import Scenario
from veneer_loadtest.simulation.traffic import Asked, traffic

from tests.refused import refused

TRACE = (
    TraceLine(0.0, 3, "sql", 10),
    TraceLine(2.0, 4, "chat", 20),
    TraceLine(4.0, 5, "", 30),
    TraceLine(6.0, 6, "chat", 40),
)
NAMED = Scenario(trace=TRACE, adapters=2, warm=0.0)


def seen(scenario: Scenario) -> list[tuple[float, int | None, int, int]]:
    asked: list[Asked] = list(traffic(scenario))
    return [(a.at_s, a.adapter, a.prompt_tokens, a.answer_tokens) for a in asked]


def test_requests_are_those_of_the_file_and_adapter_0_is_the_most_used() -> None:
    assert seen(NAMED) == [
        (0.0, 1, 10, 3),
        (2.0, 0, 20, 4),
        (4.0, None, 30, 5),
        (6.0, 0, 40, 6),
    ]


def test_speed_divides_times_only() -> None:
    fast = seen(replace(NAMED, speed=4.0))
    assert [each[0] for each in fast] == [0.0, 0.5, 1.0, 1.5]
    assert [each[1:] for each in fast] == [each[1:] for each in seen(NAMED)]


def test_adapters_are_drawn_by_zipf_if_the_file_names_none() -> None:
    lines = tuple(TraceLine(n / 100, 4, "", 10) for n in range(4000))
    drawn = [each.adapter for each in traffic(Scenario(trace=lines, adapters=20, seed=3))]
    assert None not in drawn
    share = 1 / sum(1 / (n + 1) for n in range(20))
    assert drawn.count(0) / 4000 == pytest.approx(share, rel=0.1)
    assert drawn.count(4) / 4000 == pytest.approx(share / 5, rel=0.25)
    again = [each.adapter for each in traffic(Scenario(trace=lines, adapters=20, seed=3))]
    other = [each.adapter for each in traffic(Scenario(trace=lines, adapters=20, seed=4))]
    assert drawn == again != other


def test_a_replay_takes_what_its_requests_cost() -> None:
    """Prompts and answers are as long as the file says; only the request with an adapter needs
    a load."""
    costs = Costs(
        front_s=0.0,
        back_s=0.0,
        step_s=1e-3,
        row_s=5e-3,
        prompt_token_s=1e-3,
        attention_s=0.0,
        adapter_s=0.0,
        load_s=0.0,
        load_byte_s=0.0,
    )
    lines = (TraceLine(1.0, 9, "", 200), TraceLine(5.0, 9, "a", 200))
    figures = simulate(
        Scenario(trace=lines, adapters=1, warm=0.0, replicas=1), "adapter", costs
    )
    assert (figures.ttft_p50_s, figures.ttft_p99_s) == pytest.approx((0.201, 0.201))
    assert (figures.itl_p50_s, figures.itl_p99_s) == pytest.approx((6e-3, 6e-3))
    assert figures.seconds == pytest.approx(5.0 + 0.201 + 8 * 6e-3)
    assert (figures.answered, figures.loads, figures.hit_rate) == (2, 1, 0.0)


def test_a_replay_depends_on_file_and_seed_only_and_speed_makes_it_harder() -> None:
    lines = tuple(TraceLine(n / 10, 4 + n % 9, "", 10 + n % 60) for n in range(200))
    scenario = Scenario(trace=lines, seed=3, warm=0.0)
    first, again, fast = (
        msgspec.structs.replace(simulate(each, "adapter", Costs()), cpu_s=0.0)
        for each in (scenario, scenario, replace(scenario, speed=8.0))
    )
    assert first == again
    assert first.answered == fast.answered == 200
    assert fast.ttft_p50_s > 1.5 * first.ttft_p50_s
    assert fast.seconds < first.seconds / 4


@pytest.mark.parametrize(
    "line", [TraceLine(0.0, 1000, "", 1100), TraceLine(0.0, 3, "", 0, "a text")]
)
def test_a_request_that_cannot_be_simulated_is_refused(line: TraceLine) -> None:
    with refused(BadOption, field="trace"):
        Scenario(trace=(*TRACE, line))


def test_the_program_replays_azures_columns_and_names_a_bad_row(tmp_path: Path) -> None:
    trace = tmp_path / "azure.csv"
    rows = [f"2023-11-16 18:17:{n // 2:02}.{n % 2 * 5}00000,{20 + n},9" for n in range(60)]
    header = "TIMESTAMP,ContextTokens,GeneratedTokens"
    trace.write_text("\n".join([header, *rows]))
    options = ["run", "--routing", "adapter", "--trace", str(trace), "--speed", "2"]
    answer = CliRunner().invoke(command.cli, options)
    assert answer.exit_code == 0, answer.output
    printed = dict(
        line.rsplit(maxsplit=1) for line in answer.output.splitlines() if len(line.split()) > 1
    )
    assert printed["requests measured"] == "54"
    assert printed["length s"] == "15"
    trace.write_text("\n".join([header, *rows, "2023-11-16 18:17:31,20,-1"]))
    answer = CliRunner().invoke(command.cli, options)
    assert answer.exit_code == 1
    assert "line 62: `GeneratedTokens` must be 1 or more" in " ".join(answer.output.split())
