"""Pages of ``swap`` and ``compare``, the schema of all result files."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner
from veneer_loadtest.cli import cli
from veneer_loadtest.errors import BadResult
from veneer_loadtest.html.page import page
from veneer_loadtest.results import Result, read_result, write_result
from veneer_loadtest.results.schema import schema_text

from tests.refused import refused
from tests.unit.loadtest import results_kit as kit
from tests.unit.loadtest.page_kit import Page

SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "loadtest-result.schema.json"
HOSTILE = "<script>alert(1)</script>"


def test_a_swap_tells_what_each_tier_adds() -> None:
    found = Page(page([kit.swap()]))
    assert found.plots == 2
    assert (
        "The median first token takes 70.0 ms; another adapter adds 1.0 ms from DEVICE"
        in found.text
    )
    assert "40.0 ms from DISK" in found.text
    row = found.row("another, on DISK, in page cache")
    assert (row[0], row[3]) == ("100 ms", "+30.0 ms")
    assert found.row("during uploads") == ["44.0 ms", "88.0 ms", "132 ms"]
    assert "the longest wait was 132 ms, 3.3 median steps" in found.text


def test_a_swap_that_was_stopped_or_had_no_uploads() -> None:
    found = Page(page([kit.swap(churn=None, partial=True, why="ended by SIGINT")]))
    assert found.plots == 1
    assert found.banners == ["Partial: ended by SIGINT. The figures cover what had ended."]
    assert "Left out. No adapter was uploaded" in found.text
    nothing = Page(page([kit.swap(cases={}, churn=None, summary={}, partial=True)]))
    assert nothing.plots == 0
    assert "Nothing was measured." in nothing.text


def test_two_swaps_side_by_side() -> None:
    found = Page(page([kit.swap(label="old"), kit.swap(label=HOSTILE)]))
    assert found.plots == 2
    assert "A: old: the median first token takes 70.0 ms" in found.text
    assert not [tag for tag, _ in found.tags if tag == "script"]


def test_a_comparison_tells_losses_and_ties_as_well() -> None:
    found = Page(page([kit.compare()]))
    assert found.plots == 2
    assert "1 stream: Veneer is 2.00 times as fast as peft, as fast as llama-server." in (
        found.text
    )
    assert "8 streams: Veneer is 2.40 times as fast as peft, 2.00 times" in found.text
    assert found.row("1 stream, llama-server")[-1] == "0.98 (ranges overlap)"
    assert found.row("8 streams, peft")[-1] == "2.40"
    assert found.row("llama-server")[0] == "llama-server --threads 2"
    assert "misses PEFT's likeliest tokens by 0.200 nats a token" in found.text
    stopped = Page(page([kit.compare(levels=[], partial=True, why="ended by SIGTERM")]))
    assert stopped.plots == 0
    assert "Nothing was measured" in stopped.text


def test_other_kinds_have_nothing_to_lay_side_by_side() -> None:
    with refused(BadResult, cause="kinds"):
        page([kit.swap(), kit.compare()])


@pytest.mark.parametrize("make", [kit.swap, kit.compare])
def test_report_reads_what_the_commands_write(make: object, tmp_path: Path) -> None:
    result: Result = make(label="mine")  # type: ignore[operator]
    file, html = tmp_path / "a.json", tmp_path / "a.html"
    write_result(file, result)
    assert read_result(file) == result
    done = CliRunner().invoke(cli, ["report", str(file), "--html", str(html)])
    assert done.exit_code == 0, done.output
    assert "mine" in done.output
    assert html.read_text().startswith("<!DOCTYPE html>")
    mixed = CliRunner().invoke(cli, ["report", str(file), str(_other(result, tmp_path))])
    assert mixed.exit_code == 1
    assert "results of one kind" in mixed.stderr


def _other(result: Result, folder: Path) -> Path:
    file = folder / "other.json"
    write_result(file, kit.run(kit.level()))
    return file


# -------------------------------------------------------------------------- schema


def test_the_schema_in_docs_is_of_these_classes() -> None:
    assert SCHEMA.read_text("utf-8") == schema_text(), "run `make schema`"


@pytest.mark.parametrize(
    "result",
    [kit.run(kit.level()), kit.find_max((1, 1.0)), kit.swap(), kit.compare()],
    ids=lambda result: type(result).__name__,
)
def test_results_have_the_fields_of_the_schema(result: Result) -> None:
    schema = json.loads(schema_text())
    told = json.loads(msgspec.json.encode(result))
    own = schema["$defs"][type(result).__name__]
    assert schema["discriminator"]["mapping"][told["kind"]].endswith(type(result).__name__)
    assert set(told) == set(own["properties"])
    assert set(own["required"]) <= set(told)
    assert own["description"]
