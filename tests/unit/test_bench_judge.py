"""Judging speeds against recorded ones: what is a loss, what is noise. Measures no times."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.backends import KINDS, Kind, ratios
from tests.bench.judge import Record, Spread, judge, read_records, write_record

RATIO = "native / torch, mixed, 8 rows"


@pytest.mark.parametrize(
    ("recorded", "found", "lost"),
    [
        # Quiet runs: 10 % of what was recorded is allowed.
        (Spread(5.0, 0.01), Spread(4.51, 0.01), False),
        (Spread(5.0, 0.01), Spread(4.49, 0.01), True),
        # Loud ones: three times the MAD, whichever of both is larger.
        (Spread(5.0, 0.4), Spread(3.81, 0.01), False),
        (Spread(5.0, 0.4), Spread(3.79, 0.01), True),
        (Spread(5.0, 0.01), Spread(3.81, 0.4), False),
        (Spread(5.0, 0.01), Spread(3.79, 0.4), True),
        # A gain is no loss.
        (Spread(5.0, 0.01), Spread(9.0, 0.01), False),
    ],
)
def test_a_loss_is_what_noise_does_not_explain(
    recorded: Spread, found: Spread, lost: bool
) -> None:
    assert bool(judge({RATIO: recorded}, {RATIO: found})) is lost


def test_a_loss_names_the_ratio_both_values_and_the_noise() -> None:
    same = {"native mixed / base, 1 row": Spread(0.9, 0.01)}
    (loss,) = judge({RATIO: Spread(5.0, 0.02), **same}, {RATIO: Spread(3.0, 0.1), **same})
    assert str(loss) == (
        "native / torch, mixed, 8 rows: recorded 5.000, found 3.000, a loss of 2.000 where "
        "noise allows 0.500 (MAD 0.020 recorded, 0.100 found)"
    )


def test_ratios_that_are_not_both_recorded_and_measured_are_told() -> None:
    one, other = {RATIO: Spread(5.0, 0.0)}, {"another": Spread(5.0, 0.0)}
    # The bench's own words, of `tests.bench.judge`.
    with pytest.raises(
        ValueError, match="another, native / torch, mixed, 8 rows; record again"
    ):
        judge(one, other)


def test_one_run_far_off_moves_neither_median_nor_spread() -> None:
    spread = Spread.of([5.0, 5.1, 4.9, 5.0, 1.0])
    assert spread.median == 5.0
    assert spread.mad == pytest.approx(0.1)


def test_each_cpu_has_its_record(tmp_path: Path) -> None:
    file = tmp_path / "guard.json"
    assert read_records(file) == {}
    first = Record({"torch": "2.13"}, {RATIO: Spread(5.0, 0.02)})
    second = Record({"torch": "2.14"}, {RATIO: Spread(2.0, 0.1)})
    write_record(file, "a CPU", second)
    write_record(file, "another", second)
    write_record(file, "a CPU", first)
    assert read_records(file) == {"a CPU": first, "another": second}


def test_ratios_are_of_speeds() -> None:
    """Seconds a step: torch 0.030 and 0.060, native 0.005 and 0.010."""
    times: dict[Kind, float] = dict(zip(KINDS, (0.030, 0.060, 0.005, 0.010), strict=True))
    found = ratios(times)
    assert found == {
        "native / torch, base": pytest.approx(6.0),
        "native / torch, mixed": pytest.approx(6.0),
        "native mixed / base": pytest.approx(0.5),
    }
