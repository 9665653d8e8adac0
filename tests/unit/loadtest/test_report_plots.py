"""The plots of the report page, and where there is nothing to draw."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from veneer_loadtest.html.page import page
from veneer_loadtest.results import Requests, Result

from tests.unit.loadtest import results_kit as kit
from tests.unit.loadtest.page_kit import Page, keep_figures

TALLER = ("tokens", "due", "ended", "running")
"""Of a timeline."""


def _page(*results: Result) -> Page:
    return Page(page(results))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return keep_figures(monkeypatch)


def _drawn(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, axis) for key, figure in figures.items() for axis in figure.axes)


@pytest.mark.usefixtures("figures")
def test_without_metrics_the_plot_is_left_out_with_a_reason() -> None:
    with_metrics, without = (
        kit.run(kit.level()),
        kit.run(kit.level(residency=None, server=None)),
    )
    found = _page(without)
    assert found.plots == _page(with_metrics).plots - 1
    assert "the server's metrics were not read" in found.text


@pytest.mark.usefixtures("figures")
def test_nothing_measured_is_a_page_too() -> None:
    empty = kit.level(
        requests=Requests(ok=0, left=0, failed=0, stopped=0),
        first_token_ms=None,
        inter_token_ms=None,
        end_to_end_ms=None,
        queue_ms=None,
        adapter_load_ms=None,
        by_tier={},
        by_adapter={},
        slo=None,
        loads=[],
        residency=None,
        server=None,
        timeline=msgspec.structs.replace(
            kit.timeline(),
            **{key: [0] for key in ("due", "ended", "failed", "tokens", "running")},
            first_token_p50_ms=[None],
            first_token_max_ms=[None],
        ),
    )
    assert _page(kit.run(empty, partial=True, why="ended by SIGINT")).plots == 0
    assert _page(kit.run(partial=True, why="ended by SIGINT")).plots == 0
    assert _page(kit.find_max(partial=True, why="ended by SIGINT")).plots == 0


def test_levels_are_drawn_against_their_number_of_adapters(figures: dict[str, Any]) -> None:
    levels = [kit.level(n, tokens_per_s=rate) for n, rate in ((1, 90.0), (8, 60.0), (32, 20.0))]
    text = _page(kit.run(*levels)).text
    rates, _ = figures["adapters"].axes
    (line,) = rates.get_lines()
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 8, 32], [90.0, 60.0, 20.0]]
    assert "With 1: 90.0 tokens/s and a first token's p99 of 900 ms, with 32: 20.0" in text
    assert len(figures["latency"].axes[0].get_lines()) >= 3


@pytest.mark.usefixtures("figures")
def test_many_levels_are_drawn_in_part_and_the_tables_have_all() -> None:
    found = _page(kit.run(*(kit.level(number) for number in range(1, 21))))
    assert "show 8 of 20 loads" in found.text
    adapters = [cell for row in found.rows if row[1:2] == ["adapters"] for cell in row[2:]]
    assert adapters == [str(number) for number in range(1, 21)]


def test_find_max_marks_its_limit_and_what_it_found(figures: dict[str, Any]) -> None:
    text = page([kit.find_max((1, 1.0), (2, 0.95), (4, 0.4), (3, 0.8))])
    good, first = figures["rate"].axes
    points = good.get_lines()[0]
    assert list(points.get_xdata()) == [1, 2, 3, 4]
    assert list(points.get_ydata()) == pytest.approx([100, 95, 80, 40])
    levels = [[*line.get_ydata()] for line in (*good.get_lines(), *first.get_lines())]
    assert [90, 90] in levels
    assert [600, 600] in levels
    assert [2, 2] in [[*line.get_xdata()] for line in good.get_lines()]
    assert "2 requests/s is the highest rate that kept the limits (95% good); 3 broke" in text
    assert (
        "Plots over time and of latencies show 2 of 4 loads: 2 requests/s, 3 requests/s" in text
    )
    assert "not even 4 requests/s" in page([kit.find_max((4, 0.4))])
    assert "the server may do more" in page([kit.find_max((4, 1.0))])


def test_all_that_is_drawn_is_within_its_axes(figures: dict[str, Any]) -> None:
    """Also in a row of plots that share an axis, whichever of them is the highest."""
    small, big = kit.level(1), kit.level(8, first=(4000.0, 9000.0), timeline=kit.timeline(3))
    tall = msgspec.structs.replace(
        big.timeline, **{key: [99 * n for n in getattr(big.timeline, key)] for key in TALLER}
    )
    results: list[Result] = [kit.run(small, msgspec.structs.replace(big, timeline=tall))]
    page(results)
    page([kit.find_max((1, 1.0), (20, 0.1))])
    assert {"latency", "timeline0", "residency0", "tiers", "adapters", "rate"} <= set(figures)
    for key, axis in _drawn(figures):
        drawn, seen = axis.dataLim, axis.viewLim
        assert drawn.ymax <= max(seen.intervaly), key
        assert drawn.ymin >= min(seen.intervaly), key
        assert drawn.xmax <= max(seen.intervalx), key
        assert drawn.xmin >= min(seen.intervalx), key


def test_a_page_is_of_its_results_only_not_of_the_users_style(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import matplotlib

    wanted = page([kit.run(kit.level())])
    monkeypatch.setitem(matplotlib.rcParams, "lines.marker", "x")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert page([kit.run(kit.level())]) == wanted
    assert matplotlib.rcParams["axes.facecolor"] == "red"
