"""``make``, the programs and the suite share one cache, so a base is downloaded once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from veneer_server.config import load_config

from tests import places
from tests.places import REPOSITORY

SHOW = "show:; @echo in $$VENEER_CACHE_DIR"


def clean_environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("VENEER_")}
    return {**kept, **more}


def made(folder: Path, **more: str) -> str:
    """Where ``make`` sends the programs that it starts; "" is their own choice."""
    shutil.copy(REPOSITORY / "Makefile", folder)
    command = ["make", "--silent", "--no-print-directory", f"--eval={SHOW}", "show"]
    told = subprocess.run(
        command,
        cwd=folder,
        env=clean_environment(**more),
        capture_output=True,
        text=True,
        check=True,
    )
    return told.stdout.strip().removeprefix("in").strip()


def test_make_leaves_the_cache_to_the_programs(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "veneer" / "train-data").mkdir(parents=True)
    assert made(tmp_path) == ""
    assert made(tmp_path, VENEER_CACHE_DIR="/elsewhere") == "/elsewhere"


def test_a_checkout_that_has_a_base_keeps_to_it(tmp_path: Path) -> None:
    (tmp_path / ".cache" / "veneer" / "bases").mkdir(parents=True)
    assert made(tmp_path) == str(tmp_path / ".cache" / "veneer")
    assert made(tmp_path, VENEER_CACHE_DIR="/elsewhere") == "/elsewhere"


def test_the_suite_asks_the_server_for_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "REPOSITORY", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("VENEER_CACHE_DIR", raising=False)
    assert places.cache_dir() == load_config({}, {}).cache_dir
    assert places.cache_dir().is_relative_to(tmp_path / "home")
    (tmp_path / ".cache" / "veneer" / "bases").mkdir(parents=True)
    assert places.cache_dir() == tmp_path / ".cache" / "veneer"
    monkeypatch.setenv("VENEER_CACHE_DIR", str(tmp_path / "other"))
    assert places.cache_dir() == tmp_path / "other"


@pytest.mark.real_base
def test_what_make_imported_is_fetched_no_second_time(
    base_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    """By a program that is started by hand, in another folder, without a network."""
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    (home / ".cache" / "veneer").symlink_to(cache_dir)
    done = subprocess.run(
        [Path(sys.executable).with_name("veneer-server"), "model", "path", "smollm2-135m"],
        cwd=tmp_path,
        env=clean_environment(HOME=str(home), PIP_INDEX_URL="http://127.0.0.1:1/"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()) == home / ".cache" / "veneer" / "bases" / "smollm2-135m"
    assert "downloading" not in done.stderr
