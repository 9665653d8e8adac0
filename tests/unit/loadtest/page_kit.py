"""Pages of reports, taken apart."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
from veneer_loadtest.html import plots, rate_plots, tier_plots, timeline


class Page(HTMLParser):
    """A page's tags, its text, its banners, and the cells of its tables' rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.banners: list[str] = []
        self.text = ""
        self._into: list[str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.tags.append((tag, own))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self._into = self.rows[-1]
        elif (own.get("class") or "").startswith("banner"):
            self.banners.append("")
            self._into = self.banners

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "div"):
            self._into = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into is not None:
            self._into[-1] += data

    def row(self, *names: str) -> list[str]:
        """The cells after these in the first row that starts with them."""
        found = (row for row in self.rows if row[: len(names)] == list(names))
        return next(found)[len(names) :]

    @property
    def plots(self) -> int:
        return sum(tag == "svg" for tag, _ in self.tags)


def keep_figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Matplotlib's figures by key, as at the time of writing; the page gets an empty ``<svg>``
    instead, which is faster."""
    kept: dict[str, Any] = {}

    def svg_of(figure: Any, key: str, _title: str) -> str:
        kept.setdefault(key, figure)
        return "<svg></svg>"

    for module in (plots, timeline, tier_plots, rate_plots):
        monkeypatch.setattr(module, "svg_of", svg_of)
    return kept
