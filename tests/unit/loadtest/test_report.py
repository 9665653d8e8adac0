"""The command ``report`` and its page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from veneer_loadtest.cli import cli
from veneer_loadtest.html import plots
from veneer_loadtest.html.page import page, write_page
from veneer_loadtest.results import (
    FORMAT,
    GeneratorFigures,
    Result,
    ServerCounts,
    TierShares,
    write_result,
)

from tests.unit.loadtest import results_kit as kit
from tests.unit.loadtest.page_kit import Page, keep_figures

HOSTILE = "<script>alert(1)</script>\"'&$x^{"


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    return keep_figures(monkeypatch)


def _page(*results: Result) -> Page:
    return Page(page(results))


@pytest.mark.usefixtures("figures")
def test_key_figures_and_captions_tell_the_data() -> None:
    found = _page(kit.run(kit.level()))
    assert found.row("First token", "p50") == ["400 ms"]
    assert found.row("p99") == ["900 ms"]
    assert found.row("new tokens/s") == ["80.0"]
    assert found.row("Goodput", "within limits, share") == ["90%"]
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
def test_adapters_of_others_in_memory_are_not_counted_as_the_loads() -> None:
    """The server's metrics count every adapter that it holds: three, where two are loaded."""
    held = TierShares(
        at_s=[0.0, 1.0],
        adapters={"device": [1, 3], "host": [1, 2]},
        bytes={"device": [0, 3_000_000], "host": [0, 2_000_000]},
    )
    text = _page(kit.run(kit.level(residency=held))).text
    assert "in DEVICE of 2" not in text
    assert "in HOST of 2" not in text
    assert "The load asked for 2 adapters; the server held at most 3 in DEVICE (3 MB)" in text
    assert "including adapters other than the load's" in text
    own = _page(kit.run(kit.level())).text
    assert "the server held at most 1 in DEVICE (1 MB) and 2 in HOST (2 MB)" in own
    assert "others than" not in own


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


def test_a_label_with_control_characters_is_drawn() -> None:
    """SVG is XML, which has none of them."""
    levels = [kit.run(kit.level(), label=f"{name}\x01\uffff") for name in "ab"]
    assert "A: a\ufffd\ufffd" in "".join(re.findall(r"<svg.*?</svg>", page(levels), re.S))


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


@pytest.mark.usefixtures("figures")
def test_partial_is_told_first() -> None:
    found = _page(kit.run(kit.level(), partial=True, why="ended by SIGINT"))
    assert found.banners[0].startswith("Partial: ended by SIGINT.")


@pytest.mark.usefixtures("figures")
@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"late_p99_ms": 10.5}, "The generator was late: one request in a hundred was sent"),
        ({"lost": 3}, "Requests lost: no result arrived for 3 requests that were sent."),
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
        (b'{"kind": "run", "format": 1, "lev', "is not a complete result file"),
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
