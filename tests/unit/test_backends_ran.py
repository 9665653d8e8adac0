"""A suite that falls back to torch on a machine that can run the native backend fails."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from veneer_server.wire.messages import EngineConfig

from tests import backends_ran
from tests.places import REPOSITORY

NATIVE = "native (avx2)"


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this suite itself is run with."""
    for name in ("VENEER_BACKEND", "VENEER_NATIVE_INSTRUCTIONS", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends_ran, "RAN", backends_ran.RAN.copy())


def possible(monkeypatch: pytest.MonkeyPatch, answer: bool) -> None:
    monkeypatch.setattr(backends_ran, "native_possible", lambda: answer)


def test_an_engine_that_falls_back_fails_its_test(monkeypatch: pytest.MonkeyPatch) -> None:
    possible(monkeypatch, True)
    backends_ran.check(NATIVE, torch_wanted=False)
    backends_ran.check("torch", torch_wanted=True)
    # The suite's own words, of `tests.backends_ran`.
    with pytest.raises(AssertionError, match=r"fell back to torch: no compiler"):
        backends_ran.check("torch", torch_wanted=False, why="no compiler")
    possible(monkeypatch, False)
    backends_ran.check("torch", torch_wanted=False)


@pytest.mark.parametrize(
    "flags", [["--dtype", "float32"], ["--dtype=float32"], ["--backend", "torch"]]
)
def test_a_server_says_which_it_has(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    possible(monkeypatch, True)
    line = "veneer ready  device=cpu  backend=torch  context=8192\n"
    backends_ran.check_ready_line(line, flags)
    backends_ran.check_ready_line(line.replace("torch", NATIVE), [])
    with pytest.raises(AssertionError, match="fell back to torch"):
        backends_ran.check_ready_line(line, ["--dtype", "bfloat16", "--threads", "1"])


def test_a_whole_run_without_a_native_engine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    possible(monkeypatch, True)
    assert not backends_ran.missing({"torch": 30, NATIVE: 1})
    assert "no engine ran with the native backend" in backends_ran.missing({"torch": 30})
    monkeypatch.setenv("VENEER_NATIVE_INSTRUCTIONS", "avx512-bf16")
    assert "avx512-bf16" in backends_ran.missing({NATIVE: 1})
    monkeypatch.setenv("VENEER_BACKEND", "torch")
    assert not backends_ran.missing({"torch": 30})
    monkeypatch.delenv("VENEER_BACKEND")
    possible(monkeypatch, False)
    assert not backends_ran.missing({"torch": 30})
    monkeypatch.setenv("CI", "true")
    assert "CI needs a machine" in backends_ran.missing({"torch": 30})


@pytest.mark.parametrize(
    ("more", "status"), [([], 0), (["--whole"], 1), (["--whole", "-n1"], 1)]
)
def test_it_ends_a_run(more: list[str], status: int, tmp_path: Path) -> None:
    """Of the real suite's conftest, over a test that starts no engine; with workers too."""
    chosen = "tests/unit/test_backends_ran.py::test_an_engine_that_falls_back_fails_its_test"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--basetemp", str(tmp_path / "t"), *more, chosen],
        cwd=REPOSITORY,
        env=environment | {"CI": "true"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    # Of this machine, whatever it can do: with CI set one that cannot fails as well.
    assert ("FAILED: " in done.stdout) == bool(status)


def test_servers_and_engines_follow_what_the_suite_is_run_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VENEER_BACKEND", "native")
    monkeypatch.setenv("VENEER_NATIVE_INSTRUCTIONS", "avx2")
    monkeypatch.setenv("VENEER_THREADS", "1")
    monkeypatch.setenv("VENEER_BASE", "elsewhere")
    environment = backends_ran.server_environment()
    assert "VENEER_BASE" not in environment
    assert environment["VENEER_NATIVE_INSTRUCTIONS"] == "avx2"
    plain = EngineConfig(base_folder="", cache_folder="", base_name="", weights_fingerprint="")
    config = backends_ran.with_asked(plain)
    assert (config.backend, config.native_instructions, config.threads) == ("native", "avx2", 1)
