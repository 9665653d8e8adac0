"""The interface of a row of the reliability scoreboard.

A row is a module ``tests/torture/rows/row_NN_what.py`` with four names; the runner finds
it by its file name::

    ROW = 4
    TITLE = "power loss"

    def run(scale: Scale) -> Outcome:
        '''Torture the product. `Outcome.failures` is empty if it passed.'''

    def controls(scale: Scale) -> Iterable[Control]:
        '''Planted bugs. Each runs the same check against a broken product.'''

Both functions get the same `Scale`: quick or full, a seed, an empty folder. They must share the
code that judges (so that a control shows that *this* check can fail), and all randomness must
come from `Scale.random`, so that a seed repeats a run. `controls` plants its bugs at the
product's edge: an argument, a subclass, a patched function that is restored at once, a child
process; never an edit of a file. Each row has its own process.

The runner fails (exit 1) for a row with failures, without controls, or with a control
that was not caught.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much to do.

    Attributes:
        full: use the scoreboard's numbers; otherwise the quick form for every test run.
        seed: seed that the runner prints; the same seed repeats the run.
        work: an empty folder, removed afterwards.
    """

    full: bool
    seed: int
    work: Path

    def pick(self, quick: _T, full: _T) -> _T:
        """Return ``full`` in the full form, else ``quick``."""
        return full if self.full else quick

    def random(self, purpose: str = "") -> random.Random:
        """Return a generator for one purpose, so that adding one does not change others."""
        return random.Random(f"{self.seed} {purpose}")

    def folder(self, name: str) -> Path:
        """Make a new empty folder in `work`."""
        folder = self.work / name
        folder.mkdir(parents=True)
        return folder


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a run.

    Attributes:
        figure: what was done and measured, as text for a table's cell.
        bar: requirement for the figure.
        failures: one line each, with how to reproduce it; empty if the bar is met.
        notes: notes for the reader besides the figure, for example about a part left out.
        skipped: why nothing was run, and what to install; "" if it was run. A skipped row
            is printed as such, does not fail, and its controls are not run.
    """

    figure: str
    bar: str
    failures: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Control:
    """A planted bug and whether the check caught it.

    Attributes:
        planted: the bug, in a few words.
        caught: the first failure that the check reported; "" if there was none.
    """

    planted: str
    caught: str

    @classmethod
    def of(cls, planted: str, outcome: Outcome) -> Control:
        """Make the control whose check had this ``outcome``."""
        return cls(planted, outcome.failures[0] if outcome.failures else "")


class RowModule(Protocol):
    """What a row's module must define."""

    ROW: int
    TITLE: str

    def run(self, scale: Scale) -> Outcome: ...

    def controls(self, scale: Scale) -> Iterable[Control]: ...
