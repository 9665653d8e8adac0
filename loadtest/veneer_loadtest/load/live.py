"""A live view of a load on a terminal."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final

from rich.live import Live
from rich.table import Table
from veneer_registry.screen import Screen

from veneer_loadtest.load.generator import LoadOutcome
from veneer_loadtest.load.records import Record
from veneer_loadtest.quantiles import percentiles

_RECENT_S: Final = 5.0


class LiveView:
    """A few lines that are redrawn; shows nothing if standard error is not a terminal."""

    def __init__(self, title: str, duration_s: float) -> None:
        self._title = title
        self._duration_s = duration_s
        self._console = Screen(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._read = 0
        self._ok = self._failed = self._left = 0
        self._recent: list[Record] = []
        self._drawn = 0.0

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def update(self, loaded: LoadOutcome) -> None:
        """Show the results so far; redraws at most a few times per second."""
        if not self._console.is_terminal:
            return
        new = loaded.records[self._read :]
        self._read += len(new)
        self._ok += sum(r.outcome == "ok" for r in new)
        self._failed += sum(r.outcome == "failed" for r in new)
        self._left += sum(r.outcome == "left" for r in new)
        now = time.monotonic() - loaded.start
        self._recent = [r for r in (*self._recent, *new) if r.end_s > now - _RECENT_S]
        if now - self._drawn >= 0.25:
            self._drawn = now
            self._live.update(self._table(loaded, now))

    def _table(self, loaded: LoadOutcome, now: float) -> Table:
        sent = sum(loaded.sent.values())
        running = sent - self._read
        table = Table.grid(padding=(0, 2))
        of = f" of {self._duration_s:g}" if self._duration_s else ""
        table.add_row(
            f"[bold]{self._title}[/bold]", f"{now:.0f}{of} s", "Ctrl-C: stop, and report"
        )
        table.add_row(
            f"sent {sent}",
            f"running {running}",
            f"ok {self._ok}" + (f"  left {self._left}" if self._left else ""),
            f"[red]failed {self._failed}[/red]" if self._failed else "failed 0",
        )
        table.add_row(*self._recently(now))
        return table

    def _recently(self, now: float) -> list[str]:
        within = min(_RECENT_S, max(now, 1e-3))
        tokens = sum(r.tokens for r in self._recent)
        first = [r.first_token_s for r in self._recent if r.first_token_s is not None]
        row = [f"last {within:.0f} s:", f"{tokens / within:.0f} tok/s"]
        if first:
            p50, p99 = percentiles(first, [0.5, 0.99])
            row.append(f"first token p50 {p50 * 1e3:.0f} ms, p99 {p99 * 1e3:.0f} ms")
        return row
