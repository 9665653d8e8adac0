"""``metrics.jsonl``: a run's metrics, step by step; and its curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from veneer_registry.replacing import replace_file

from veneer_train.checkpoint import disk_errors
from veneer_train.plain_json import plain_json

Report = Callable[[Mapping[str, Any]], None]
"""Called with each row as it is written."""


class MetricsLog:
    """Writes one object per line and flushes it; non-finite numbers become null.

    Args:
        path: the file; None if another process of the run writes it.
        after: keep existing rows up to this step, from which the run resumes. None: keep none.

    Attributes:
        rows: all rows.
    """

    def __init__(self, path: Path | None, report: Report, *, after: int | None = None) -> None:
        self.rows: list[Mapping[str, Any]] = []
        self._file = None
        self._report = report
        if path is None:
            return
        if after is not None and path.is_file():
            self.rows = [row for row in _read(path) if row["step"] <= after]
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, "".join(plain_json(row, indent=None) for row in self.rows))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **row: Any) -> None:
        """Add a row."""
        if self._file is None:
            return
        self.rows.append(row)
        with disk_errors(self._file.name, "free some space and run the same command"):
            self._file.write(plain_json(row, indent=None))
            self._file.flush()
        self._report(row)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def _read(path: Path) -> list[dict[str, Any]]:
    rows = []
    for line in path.read_text("utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # a partial line of a killed process
    return rows


def draw_curves(rows: Sequence[Mapping[str, Any]], file: Path, title: str) -> None:
    """Plot loss (of steps and validations) and gradient norm over steps, as a PNG."""
    from matplotlib.figure import Figure

    if not rows:
        return
    steps = [row for row in rows if row["event"] == "step"]
    evals = [row for row in rows if row["event"] == "eval"]
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    figure.suptitle(title)
    above.plot([r["step"] for r in steps], [r["loss"] for r in steps], lw=0.9, label="train")
    above.plot(
        [r["step"] for r in evals],
        [r["val_loss"] for r in evals],
        marker="o",
        label="validation",
    )
    above.set_ylabel("loss, nats a token")
    above.legend(frameon=False)
    below.plot([r["step"] for r in steps], [r["grad_norm"] for r in steps], lw=0.9)
    below.set_yscale("log")
    below.set_ylabel("gradient norm before clipping")
    below.set_xlabel("optimiser step")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)
