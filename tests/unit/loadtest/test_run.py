"""The command ``run``, as a user types it, against a fake server."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result
from veneer_loadtest import report
from veneer_loadtest.cli import cli
from veneer_loadtest.commands import common
from veneer_loadtest.load.csv_file import COLUMNS
from veneer_loadtest.results import RunResult, read_result

from tests.fakes.fast_target import FastTarget
from tests.ports import free_port

TRACE = '{"at_s": 0, "adapter": "a", "prompt_tokens": 3, "tokens": 2}\n'


@pytest.fixture
def server() -> Iterator[FastTarget]:
    with FastTarget() as target:
        yield target


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["run", *arguments])


def test_result_files_and_summary(server: FastTarget, tmp_path: Path) -> None:
    json_file, csv_file = tmp_path / "a.json", tmp_path / "a.csv"
    done = run(
        *("--server", server.grpc, "--names", "a,b", "--streams", "3", "--requests", "40"),
        *("--tokens", "4", "--popularity", "roundrobin", "--slo", "ttft=1m", "--label", "mine"),
        *("--json", str(json_file), "--csv", str(csv_file)),
        *("--fail-if", "error_share>0", "--fail-if", "lost>0"),
    )
    assert done.exit_code == 0, done.output
    result = read_result(json_file)
    assert isinstance(result, RunResult)
    (level,) = result.levels
    assert (level.requests.ok, level.adapters, level.totals.tokens) == (40, 2, 160)
    assert (result.label, result.partial, result.load.seed) == ("mine", False, 1)
    assert result.target["api"] == "veneer"
    assert result.summary["slo_share"] == 1.0
    assert f"tokens_per_s={result.summary['tokens_per_s']:.6g}" in done.output
    rows = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert [int(row["index"]) for row in rows] == list(range(40))
    assert {row["adapter"] for row in rows} == {"a", "b"}
    assert {row["tier"] for row in rows} == {"device"}
    assert all(float(row["first_token_ms"]) <= float(row["end_to_end_ms"]) for row in rows)


def test_a_load_on_the_first_of_them_and_on_all(server: FastTarget, tmp_path: Path) -> None:
    json_file = tmp_path / "a.json"
    done = run(
        *("--server", server.grpc, "--names", "a-{0..8}", "--first", "2,9", "--streams", "2"),
        *("--requests", "30", "--popularity", "roundrobin", "--json", str(json_file)),
    )
    assert done.exit_code == 0, done.output
    result = read_result(json_file)
    assert isinstance(result, RunResult)
    few, many = result.levels
    assert set(few.by_adapter) == {"a-0", "a-1"}
    assert set(many.by_adapter) == {f"a-{n}" for n in range(9)}
    ratio = many.requests_per_s / few.requests_per_s
    assert result.summary["requests_ratio"] == pytest.approx(ratio)
    assert "9 adapters, found in" in done.output


def test_an_openai_endpoint(server: FastTarget, tmp_path: Path) -> None:
    json_file = tmp_path / "a.json"
    url = f"http://{server.http}"
    done = run(
        *("--openai", url, "--names", "a,b", "--rate", "100", "--requests", "20"),
        *("--json", str(json_file)),
    )
    assert done.exit_code == 0, done.output
    result = read_result(json_file)
    assert isinstance(result, RunResult)
    assert result.levels[0].requests.ok == 20
    assert result.load.text, "without a base's folder prompts are words"


def test_an_endpoint_that_knows_no_more_than_openai(server: FastTarget) -> None:
    some = ("--openai", f"http://{server.http}", "--names", "strict", "--streams", "1")
    some += ("--requests", "2", "--fail-if", "error_share>0")
    assert run(*some).exit_code == 3
    assert run(*some, "--no-ignore-eos").exit_code == 0


def test_a_trace_is_replayed(server: FastTarget, tmp_path: Path) -> None:
    trace, json_file = tmp_path / "t.jsonl", tmp_path / "a.json"
    trace.write_text(TRACE * 3)
    done = run("--server", server.grpc, "--trace", str(trace), "--json", str(json_file))
    assert done.exit_code == 0, done.output
    result = read_result(json_file)
    assert isinstance(result, RunResult)
    assert (result.levels[0].requests.ok, result.levels[0].totals.tokens) == (3, 6)


def test_fail_if_holds(server: FastTarget) -> None:
    some = ("--server", server.grpc, "--names", "a", "--streams", "1", "--requests", "2")
    done = run(*some, "--fail-if", "tokens_per_s<1e9", "--fail-if", "lost>0")
    assert done.exit_code == 3
    assert "tokens_per_s<1e9 (it is" in done.output
    assert "lost>0" not in done.output
    # Asked for a figure that was not measured.
    assert run(*some, "--fail-if", "slo_share<0.5").exit_code == 3


def _refused(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert "Traceback" not in done.output
    found = re.search(r"error: (.*)", done.output)
    assert found, done.output
    return found[1]


def test_bad_options_are_told_in_one_line(server: FastTarget, tmp_path: Path) -> None:
    some = ("--server", server.grpc, "--names", "a", "--streams", "1")
    url = f"http://{server.http}"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    cases = {
        ("--streams", "1"): "give one of --spawn",
        (*some, "--openai", url): "give one of --spawn",
        ("--server", server.grpc, "--names", "a"): "give one of --rate",
        (*some, "--rate", "1"): "give one of --rate",
        (*some, "--duration", "soon"): "--duration 'soon'",
        (*some, "--duration", "5s", "--warmup", "5s"): "leaves nothing",
        (*some, "--popularity", "often"): "roundrobin",
        (*some, "--tokens", "0"): "--tokens '0'",
        (*some, "--slo", "fast"): "--slo",
        (*some, "--fail-if", "speed<1"): "tokens_per_s",
        (*some, "--generate", "3"): "give one of --names",
        (*some, "--first", "1,2"): "there are 1 adapters",
        ("--spawn", "--streams", "1", "--first", "1"): "--first goes with --names",
        (*some, "--json", str(tmp_path / "nowhere" / "a.json")): "folder that exists",
        (*some, "--json", str(tmp_path)): "folder that exists",
        (*some, "--metrics", f"127.0.0.1:{free_port()}"): "--metrics",
        (*some, "--model", "m"): "--openai",
        ("--server", server.grpc, "--trace", str(empty)): "holds no request",
        ("--openai", url, "--names", "wrong", "--streams", "1"): "it lists: a, b, strict",
        ("--openai", url, "--generate", "2", "--streams", "1"): "Veneer server only",
        ("--openai", f"{url}/v1", "--streams", "1"): "leave out /v1",
        ("--openai", "http://me:secret@host", "--streams", "1"): "OPENAI_API_KEY",
        ("--openai", "localhost:80", "--streams", "1"): "give a URL",
        ("--server", f"127.0.0.1:{free_port()}", "--streams", "1", "--names", "a"): "no Veneer",
        ("--openai", f"http://127.0.0.1:{free_port()}", "--streams", "1"): "no server answers",
    }
    for arguments, told in cases.items():
        assert told in _refused(*arguments), arguments


def test_ctrl_c_keeps_what_was_measured(server: FastTarget, tmp_path: Path) -> None:
    json_file = tmp_path / "a.json"
    command = [sys.executable, "-m", "veneer_loadtest.cli", "run", "--server", server.grpc]
    command += ["--names", "a", "--streams", "2", "--duration", "10m", "--json", str(json_file)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output = process.stdout.readline()
    while "sending" not in output:
        line = process.stdout.readline()
        assert line, output
        output += line
    process.send_signal(signal.SIGINT)
    output += process.communicate()[0]
    assert process.returncode == 130, output
    assert "ended by SIGINT" in output
    told = json.loads(json_file.read_text())
    assert (told["partial"], told["why"]) == (True, "ended by SIGINT")
    result = read_result(json_file)
    assert isinstance(result, RunResult)
    assert result.levels[0].generator.lost == 0


def test_an_older_server_that_does_not_tell_its_bases_sizes_gets_no_adapters(
    server: FastTarget, tmp_path: Path
) -> None:
    """FAKE: its GetServerInfo has no shape. Adapters of another base would be refused, or
    load nothing."""
    asked = ("--generate", "2", "--streams", "1", "--requests", "1")
    told = _refused("--server", server.grpc, *asked)
    assert "--base-folder" in told
    config = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64}
    config |= {"num_attention_heads": 1, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "a.json"
    known = ("--base-folder", str(tmp_path), "--names", "a", "--streams", "1")
    done = run("--server", server.grpc, *known, "--requests", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    result = read_result(file)
    assert isinstance(result, RunResult)
    assert result.load.vocab == 100


def test_a_busy_machine_is_told_by_its_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More than all of its cores cannot be used."""
    monkeypatch.setattr(report, "busy_share", lambda: 4.06)
    monkeypatch.setattr(report, "usable_cores", lambda: 2)
    common.warn_if_busy()
    told = capsys.readouterr().out
    assert "load 8.1 on 2 cores" in told
    assert "%" not in told
