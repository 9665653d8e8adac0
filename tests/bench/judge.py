"""Judge whether ratios of speeds have fallen below recorded ones by more than noise.

A ratio is recorded as the median of several runs with their spread (the median absolute
deviation, MAD). It is a loss if the present median is below the recorded one by more than
the tolerance: 10 % of the recorded median, or three times the larger of both MADs if that is
more. A MAD is about two thirds of a normal distribution's standard deviation, so three MADs
are two standard deviations of a single run. The 10 % cover differences that a few runs do not
show, such as between hours on a virtual machine. Gains are not reported.

Ratios depend on the CPU: there is a record for each.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

LEAST_TOLERANCE = 0.10
"""Smallest tolerance, as a share of the recorded ratio."""
MADS = 3


class Spread(NamedTuple):
    """A ratio over several runs."""

    median: float
    mad: float

    @classmethod
    def of(cls, runs: Sequence[float]) -> Spread:
        median = statistics.median(runs)
        return cls(median, statistics.median(abs(value - median) for value in runs))


class Loss(NamedTuple):
    """A ratio that fell by more than noise."""

    name: str
    recorded: Spread
    found: Spread
    tolerance: float

    def __str__(self) -> str:
        return (
            f"{self.name}: recorded {self.recorded.median:.3f}, found {self.found.median:.3f}, "
            f"a loss of {self.recorded.median - self.found.median:.3f} where noise allows "
            f"{self.tolerance:.3f} (MAD {self.recorded.mad:.3f} recorded, {self.found.mad:.3f} "
            "found)"
        )


class Record(NamedTuple):
    """Recorded ratios of one CPU.

    Attributes:
        about: version of torch, date and number of runs, for the reader.
        ratios: name -> ratio.
    """

    about: dict[str, str]
    ratios: dict[str, Spread]


def tolerance(recorded: Spread, found: Spread) -> float:
    """Return how much lower than recorded a ratio may be."""
    return max(LEAST_TOLERANCE * recorded.median, MADS * max(recorded.mad, found.mad))


def judge(recorded: Mapping[str, Spread], found: Mapping[str, Spread]) -> list[Loss]:
    """Return the losses.

    Raises:
        ValueError: recorded and measured ratios have different names.
    """
    if recorded.keys() != found.keys():
        apart = ", ".join(sorted(recorded.keys() ^ found.keys()))
        raise ValueError(f"recorded or measured alone: {apart}; record again")
    losses = []
    for name, then in recorded.items():
        allowed = tolerance(then, found[name])
        if then.median - found[name].median > allowed:
            losses.append(Loss(name, then, found[name], allowed))
    return losses


def read_records(file: Path) -> dict[str, Record]:
    """Read the records by CPU; there are none without a file."""
    if not file.is_file():
        return {}
    return {
        cpu: Record(
            kept["about"],
            {
                name: Spread(each["median"], each["mad"])
                for name, each in kept["ratios"].items()
            },
        )
        for cpu, kept in json.loads(file.read_text("utf-8")).items()
    }


def write_record(file: Path, cpu: str, record: Record) -> None:
    """Replace the record of one CPU; records of other CPUs stay."""
    records = read_records(file) | {cpu: record}
    kept = {
        cpu: {
            "about": each.about,
            "ratios": {
                name: {"median": round(spread.median, 3), "mad": round(spread.mad, 3)}
                for name, spread in each.ratios.items()
            },
        }
        for cpu, each in sorted(records.items())
    }
    file.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
