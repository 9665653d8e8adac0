"""``--base smollm2-135m`` means the same folder in every command and in ``veneer-server``."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner
from veneer_registry.bundled_base import BUNDLED
from veneer_registry.terminal import guarded
from veneer_server.config import load_config as server_config
from veneer_server.models.source import bundled_folder, resolve_base
from veneer_train.base_folder import progress_bar
from veneer_train.base_folder import resolve_base as train_base
from veneer_train.cli import app
from veneer_train.config import load_config

EVERY_COMMAND = [
    ["train", "--preset", "quick", "--set", "data.train=x.jsonl", "--set", "output.dir=new"],
    ["eval", "my", "--data", "x.jsonl"],
    ["verify", "my"],
    ["merge", "my", "--out", "new"],
    ["quantize", "--out", "new"],
    ["plan", "--preset", "quick"],
    ["inspect-data", "x.jsonl"],
    ["export-gguf", "my", "--out", "new"],
    ["lab", "quant-error", "--out", "new"],
]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def imported(cache: Path, base: Path) -> Path:
    """A FAKE import: the name's folder with the tiny base in it."""
    folder = bundled_folder(cache)
    folder.parent.mkdir(parents=True)
    folder.symlink_to(base)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VENEER_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def test_the_list_has_every_command_that_takes_a_base() -> None:
    takers = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback is not None and "base" in command.callback.__annotations__
    }
    assert takers == {arguments[0] for arguments in EVERY_COMMAND}


@pytest.mark.parametrize("arguments", EVERY_COMMAND, ids=lambda arguments: arguments[0])
def test_not_imported_is_one_line_with_the_command(cache: Path, arguments: list[str]) -> None:
    (cache.parent / "my").mkdir()
    (cache.parent / "my" / "adapter_config.json").write_text("{}")
    done = invoke(*arguments, "--base", BUNDLED)
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(f": veneer-server model import {BUNDLED}")
    assert str(cache) in line


def test_a_config_s_path_is_the_same_name(cache: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {{path: {BUNDLED}, name: {BUNDLED}}}\n"
        "data: {train: x.jsonl}\noutput: {dir: new}\n"
    )
    done = invoke("train", str(config))
    assert done.exit_code == 1
    assert done.stderr.rstrip().endswith(f"veneer-server model import {BUNDLED}")


def test_imported_is_used(cache: Path, tiny_base: Path) -> None:
    folder = imported(cache, tiny_base)
    assert train_base(BUNDLED) == folder
    done = invoke("plan", "--base", BUNDLED, "--preset", "quick", "--json")
    assert done.exit_code == 0, done.output
    assert (
        done.stdout
        == invoke("plan", "--base", str(folder), "--preset", "quick", "--json").stdout
    )


def test_what_an_import_left_half_done_is_no_base(cache: Path) -> None:
    folder = bundled_folder(cache)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    done = invoke("plan", "--base", BUNDLED, "--preset", "quick")
    assert done.exit_code == 1
    assert "does not contain model.safetensors" in done.stderr
    assert done.stderr.rstrip().endswith(f"veneer-server model import {BUNDLED}")


def test_a_folder_of_that_name_is_given_as_a_folder(
    cache: Path, tmp_path: Path, tiny_base: Path
) -> None:
    """As for the server, which does not look into the current folder for the name."""
    (tmp_path / BUNDLED).symlink_to(tiny_base)
    assert invoke("plan", "--base", BUNDLED, "--preset", "quick").exit_code == 1
    assert invoke("plan", "--base", f"./{BUNDLED}", "--preset", "quick").exit_code == 0


def test_the_adapter_names_the_base_by_it() -> None:
    given = load_config(
        preset="quick", under={"data": {"train": "-"}, "output": {"dir": "-"}}, base=BUNDLED
    )
    assert (given.model.path, given.model.name) == (BUNDLED, BUNDLED)


@pytest.mark.real_base
def test_server_and_training_mean_the_same_folder() -> None:
    cache = server_config({}, os.environ).cache_dir
    assert train_base(BUNDLED) == resolve_base(BUNDLED, cache).path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["merge", "--help"], ["plan", "--base", BUNDLED]]
)
def test_torch_is_not_imported_for_it(cache: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from veneer_train.cli import app\n"
        f"try: app({arguments!r})\n"
        "except SystemExit: pass\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("set()\n")


def test_a_download_s_bar_is_drawn_over_its_own_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a terminal does not obey what other people write."""
    transformers_logging.disable_progress_bar()  # as a training does, the hub's among them
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stderr", raw)
    with guarded(), progress_bar()(total=2, mininterval=0, name="hub") as bar:
        bar.update()
        bar.update()
    assert "\r" in raw.getvalue()
    assert "\\r" not in raw.getvalue()
