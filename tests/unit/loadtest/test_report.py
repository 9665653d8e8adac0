"""The command ``report`` and its page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner
from veneer_loadtest.cli import cli
from veneer_loadtest.html import plots, rate_plots, tier_plots, timeline
from veneer_loadtest.html.page import page, write_page
from veneer_loadtest.results import (
    FORMAT,
    GeneratorFigures,
    Requests,
    Result,
    ServerCounts,
    write_result,
)

from tests.unit.loadtest import results_kit as kit

HOSTILE = "<script>alert(1)</script>\"'&$x^{"


class Page(HTMLParser):
    """A page's tags, its text outside of ``<svg>``, and the cells of its tables' rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
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
        elif tag in ("h1", "h3"):
            self.headings.append("")
            self._into = self.headings
        elif (own.get("class") or "").startswith("banner"):
            self.banners.append("")
            self._into = self.banners

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "h1", "h3", "div"):
            self._into = None

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._into is not None:
            self._into[-1] += data

    def row(self, *names: str) -> list[str]:
        """Cells after these; the first row that begins so."""
        found = (row for row in self.rows if row[: len(names)] == list(names))
        return next(found)[len(names) :]

    @property
    def plots(self) -> int:
        return sum(tag == "svg" for tag, _ in self.tags)


def _page(*results: Result) -> Page:
    return Page(page(results))


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Matplotlib's figures by their key, as they were when they were written; the page has
    an empty ``<svg>`` instead, which is quicker."""
    kept: dict[str, Any] = {}

    def svg_of(figure: Any, key: str, _title: str) -> str:
        kept.setdefault(key, figure)
        return "<svg></svg>"

    for module in (plots, timeline, tier_plots, rate_plots):
        monkeypatch.setattr(module, "svg_of", svg_of)
    return kept


def _drawn(figures: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((key, axis) for key, figure in figures.items() for axis in figure.axes)


@pytest.mark.usefixtures("figures")
def test_key_figures_and_captions_tell_the_data() -> None:
    found = _page(kit.run(kit.level()))
    assert found.row("First token", "p50") == ["400 ms"]
    assert found.row("p99") == ["900 ms"]
    assert found.row("new tokens/s") == ["80.0"]
    assert found.row("Goodput", "share good") == ["90%"]
    assert found.row("Adapters", "found in DEVICE") == ["90%"]
    assert found.row("Whole request", "p50") == ["9,000 ms"]
    assert "half of the first tokens came within 400 ms" in found.text.lower()
    assert "one in a hundred took more than 900 ms" in found.text
    assert "27 of 30 requests found their adapter in DEVICE" in found.text
    assert "2 requests waited for an adapter (1 from HOST, 1 from DISK)" in found.text
    assert "Open loop: 2 requests/s on average, a Poisson process." in found.text
    assert found.banners == [
        "Counts agree: the server counted as many requests, prompt tokens and new tokens as "
        "the client."
    ]


@pytest.mark.usefixtures("figures")
def test_few_values_have_no_hundredth() -> None:
    few = kit.level(first_token_ms=kit.distribution(400, 900, count=30))
    assert "half of the first tokens came within 400 ms, the slowest of 30 took 990 ms" in (
        _page(kit.run(few)).text.lower()
    )


@pytest.mark.usefixtures("figures")
def test_two_runs_have_ratios() -> None:
    other = kit.level(first=(200.0, 1800.0), tokens_per_s=120.0)
    found = _page(kit.run(kit.level(), label="old"), kit.run(other, label="new"))
    assert found.row("", "")[:3] == ["A: old", "B: new", "B / A"]
    assert found.row("new tokens/s") == ["80.0", "120", "1.5"]
    assert found.row("First token", "p50") == ["400 ms", "200 ms", "0.5"]
    assert found.row("failed") == ["0", "0", ""]
    assert found.row("Requests", "adapters") == ["2", "2", ""]


@pytest.mark.usefixtures("figures")
def test_runs_with_the_same_levels_are_compared_level_by_level() -> None:
    first = kit.run(kit.level(1), kit.level(8, tokens_per_s=40.0))
    second = kit.run(kit.level(1), kit.level(8, tokens_per_s=10.0))
    rates = [row[1:] for row in _page(first, second).rows if row[0] == "new tokens/s"]
    assert rates == [["80.0", "80.0", "1"], ["40.0", "10.0", "0.25"]]
    uneven = _page(first, kit.run(kit.level(4)))
    assert "No ratios" in uneven.text
    assert uneven.row("new tokens/s") == ["80.0", "40.0", "80.0"]


def test_what_users_wrote_is_text() -> None:
    hostile = kit.level(
        by_adapter={HOSTILE: kit.split(3, 1.0, 2.0)},
        by_tier={HOSTILE: kit.split(3, 1.0, 2.0)},
        errors={HOSTILE: 3},
    )
    conditions = {**kit.CONDITIONS, "command": HOSTILE, "cpu": HOSTILE}
    result = kit.run(
        hostile,
        label=HOSTILE,
        conditions=conditions,
        partial=True,
        why=HOSTILE,
        target={"base_model": HOSTILE, "command": HOSTILE},
        versions={HOSTILE: HOSTILE},
        load=kit.load((HOSTILE,)),
    )
    text = page([result, result], [HOSTILE, HOSTILE])
    assert "<script" not in text.lower()
    found = Page(text)
    assert found.row("command", HOSTILE) == [HOSTILE]
    assert found.row(HOSTILE) == ["3", "3"]
    assert found.text.count(HOSTILE) > 12
    assert not [own for _, own in found.tags if any(key.startswith("on") for key in own)]


def test_nothing_comes_from_elsewhere() -> None:
    results: list[Result] = [kit.run(kit.level(1)), kit.find_max((1, 1.0), (2, 0.1))]
    text = page(results)
    found = Page(text)
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "img"})
    for _, own in found.tags:
        for key in ("src", "href", "xlink:href", "action", "data"):
            assert (own.get(key) or "#").startswith("#")
    assert "@import" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    ids = [own["id"] for _, own in found.tags if "id" in own]
    assert len(ids) == len(set(ids)), "plots share a document"
    named = set(ids)
    for target in re.findall(r'url\(#([^)]*)\)|xlink:href="#([^"]*)"', text):
        assert "".join(target) in named


def test_the_same_results_are_the_same_page() -> None:
    results = [kit.run(kit.level(8))]
    assert page(results) == page(results)


@pytest.mark.usefixtures("figures")
def test_partial_is_told_first() -> None:
    found = _page(kit.run(kit.level(), partial=True, why="ended by SIGINT"))
    assert found.banners[0].startswith("Partial: ended by SIGINT.")


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"late_p99_ms": 10.5}, "The generator was late: one request in a hundred was sent"),
        ({"lost": 3}, "Requests lost: nothing is known of 3 requests that were sent."),
        ({}, None),
    ],
)
def test_the_generator_confesses(own: dict[str, Any], told: str | None) -> None:
    fields = {"cpu_share": 0.5, "late_p50_ms": 1.0, "late_p99_ms": 10.0, "late_max_ms": 20.0}
    generator = GeneratorFigures(**{"workers": 1, "lost": 0, **fields, **own})
    found = _page(kit.run(kit.level(generator=generator, server=None)))
    assert [banner.startswith(told or "") for banner in found.banners] == [True] * bool(told)


@pytest.mark.usefixtures("figures")
def test_counts_that_disagree_and_a_busy_machine_are_told() -> None:
    server = ServerCounts(
        requests=31, prompt_tokens=900, tokens=240, agrees=False, lookups={}, evictions={}
    )
    busy = {**kit.CONDITIONS, "load_average": [1.1, 0.0, 0.0]}
    found = _page(kit.run(kit.level(server=server), conditions=busy))
    assert [banner.partition(":")[0] for banner in found.banners] == [
        "Counts disagree",
        "Busy machine",
    ]
    assert "the server counted 31 requests" in found.banners[0]


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
    text = page([kit.run(*levels)])
    rates, _ = figures["adapters"].axes
    (line,) = rates.get_lines()
    assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 8, 32], [90.0, 60.0, 20.0]]
    assert "With 1: 90.0 tokens/s and p99 900 ms, with 32: 20.0 tokens/s" in text
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


TALLER = ("tokens", "due", "ended", "running")


def test_a_page_is_written_whole_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.html"
    file.write_text("before")
    monkeypatch.setattr(plots, "svg_of", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_page(file, [kit.run(kit.level())])
    assert file.read_text() == "before"
    assert list(tmp_path.iterdir()) == [file]
    monkeypatch.undo()
    write_page(file, [kit.run(kit.level())])
    assert file.read_text("utf-8").startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [file]


def test_the_users_own_style_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    wanted = page([kit.run(kit.level())])
    monkeypatch.setitem(matplotlib.rcParams, "lines.marker", "x")
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "red")
    assert page([kit.run(kit.level())]) == wanted
    assert matplotlib.rcParams["axes.facecolor"] == "red"


def _write(folder: Path, **results: Result) -> list[str]:
    files = []
    for name, result in results.items():
        files.append(str(folder / f"{name}.json"))
        write_result(folder / f"{name}.json", result)
    return files


@pytest.mark.usefixtures("figures")
def test_the_command_shows_runs_side_by_side(tmp_path: Path) -> None:
    faster = kit.run(kit.level(first=(100.0, 450.0)))
    files = _write(tmp_path, old=kit.run(kit.level()), new=faster)
    outcome = CliRunner().invoke(cli, ["report", *files, "--html", str(tmp_path / "a.html")])
    assert outcome.exit_code == 0, outcome.output
    lines = [re.split(r"  +", line.strip()) for line in outcome.stdout.splitlines()]
    assert ["A: old.json", "B: new.json", "B/A"] in lines
    assert ["First token: p99", "900 ms", "450 ms", "0.5"] in lines
    found = Page((tmp_path / "a.html").read_text("utf-8"))
    assert found.row("First token", "p50") == ["400 ms", "100 ms", "0.25"]


@pytest.mark.usefixtures("figures")
def test_the_command_reports_what_is_partial(tmp_path: Path) -> None:
    files = _write(tmp_path, a=kit.run(kit.level(), partial=True, why="ended by [SIGINT]"))
    outcome = CliRunner().invoke(cli, ["report", *files])
    assert outcome.exit_code == 0
    assert "Partial: ended by [SIGINT]." in outcome.stdout


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "cannot read"),
        (b'{"kind": "run", "format": 1, "lev', "is no whole result file"),
        (b'{"kind": "weather"}', "holds 'weather'"),
        (b'{"kind": "run", "format": %d}' % (FORMAT + 1), "written by a newer veneer-loadtest"),
        (b'{"kind": "run", "format": 1}', "is not a result as this version writes it"),
    ],
)
def test_files_that_are_no_result_are_one_line(
    tmp_path: Path, content: bytes | None, told: str
) -> None:
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    page_file = tmp_path / "a.html"
    outcome = CliRunner().invoke(cli, ["report", str(file), "--html", str(page_file)])
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("error: ")
    assert told in outcome.stderr
    assert outcome.stderr.count("\n") == 1
    assert not page_file.exists()
