"""The search for the highest rate that keeps limits."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner
from veneer_loadtest.cli import cli
from veneer_loadtest.load.find_max import HIGHEST, find_max
from veneer_loadtest.results import FindMaxResult, Level, SloLimits, read_result

from tests.fakes.fast_target import FastTarget
from tests.unit.loadtest.test_figures import figures, record

LIMITS = SloLimits(ttft_ms=150)


class Server:
    """FAKE: keeps the limits up to a rate."""

    def __init__(self, capacity: float, stop_after: int = 1000) -> None:
        self.rates: list[float] = []
        self._capacity = capacity
        self._stop_after = stop_after

    async def attempt(self, rate: float) -> Level | None:
        if len(self.rates) == self._stop_after:
            return None
        self.rates.append(rate)
        late = rate > self._capacity
        return figures([record(0, 2.0, [0.2 if late else 0.1])], LIMITS)


@pytest.mark.parametrize("capacity", [0.02, 0.9, 1.0, 7.3, 900.0])
async def test_finds_the_capacity_within_its_precision(capacity: float) -> None:
    server = Server(capacity)
    probes, highest, bounded = await find_max(
        server.attempt, begin=1.0, share=0.99, precision=0.1
    )
    assert capacity / 1.1 <= highest <= capacity
    assert bounded
    assert [probe.rate for probe in probes] == server.rates
    assert {probe.kept for probe in probes} == {True, False}
    assert len(server.rates) < 20


async def test_nothing_keeps_them_or_nothing_breaks_them() -> None:
    none = Server(0.0)
    assert (await find_max(none.attempt, begin=1.0, share=0.99, precision=0.1))[1] == 0.0
    assert len(none.rates) < 15
    all_of_them = Server(2 * HIGHEST)
    _, highest, bounded = await find_max(
        all_of_them.attempt, begin=1.0, share=0.99, precision=0.1
    )
    assert not bounded
    assert highest > HIGHEST / 4


async def test_a_stop_keeps_what_was_found() -> None:
    probes, highest, bounded = await find_max(
        Server(100.0, stop_after=3).attempt, begin=1.0, share=0.99, precision=0.1
    )
    assert (len(probes), highest, bounded) == (3, 4.0, False)


def test_the_command(tmp_path: Path) -> None:
    json_file = tmp_path / "max.json"
    with FastTarget() as server:
        done = CliRunner().invoke(
            cli,
            [
                "find-max",
                "--server",
                server.grpc,
                "--names",
                "a",
                "--tokens",
                "1",
                *(
                    "--duration",
                    "300ms",
                    "--warmup",
                    "0s",
                    "--begin",
                    "20",
                    "--slo",
                    "ttft=0ms",
                ),
                *("--json", str(json_file), "--fail-if", "max_rate<1"),
            ],
        )
    assert done.exit_code == 3, done.output
    assert "max_rate<1 (it is 0)" in done.output
    result = read_result(json_file)
    assert isinstance(result, FindMaxResult)
    assert (result.max_rate, result.bounded) == (0.0, True)
    assert result.probes[0].rate == 20.0
    assert result.probes[0].level.requests.ok > 0
