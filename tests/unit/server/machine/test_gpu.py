"""A GPU is used if its kernels compute what they should, else the CPU.

No test has a GPU: answers of children are FAKE.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
from veneer_registry.adapter import BaseFingerprint, BaseSpec
from veneer_server import startup
from veneer_server.config import load_config
from veneer_server.models.source import BaseFolder
from veneer_server.operate.doctor.backends import cuda_check
from veneer_server.system import gpu
from veneer_server.system.machine import Gpu

from tests.unit.server.cuda.parallel_kit import CONFIG

CARD = Gpu("a card", 80 << 30, 79 << 30)
RIGHT = {
    "why": "",
    "checked": ["norm", "nf4"],
    "seconds": 1.25,
    "name": "a card",
    "capability": "9.0",
    "torch": "2.11",
    "cuda": "13.0",
    "triton": "3.6",
}
Answer = Callable[..., subprocess.CompletedProcess[str]]


def _says(stdout: str, stderr: str = "", code: int = 0) -> Answer:
    return lambda *_, **__: subprocess.CompletedProcess([], code, stdout, stderr)


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """FAKE: what the self-test's process does; there is a card."""
    monkeypatch.setattr(gpu, "find_gpu", lambda device: None if device == "cpu" else CARD)
    return lambda answer: monkeypatch.setattr(gpu.subprocess, "run", answer)


def _never(*_: Any, **__: Any) -> subprocess.CompletedProcess[str]:
    raise AssertionError("the self-test was run")


def _hangs(*_: Any, timeout: float, **__: Any) -> subprocess.CompletedProcess[str]:
    raise subprocess.TimeoutExpired("python", timeout)


def test_auto_takes_a_card_whose_kernels_are_right(child: Callable[[Answer], None]) -> None:
    child(_says("a library's greeting\n" + json.dumps(RIGHT)))
    assert gpu.choose_gpu("auto") == gpu.DeviceChoice(CARD)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (_says(json.dumps({**RIGHT, "why": "nf4: 3 numbers are wrong"})), "nf4: 3 numbers"),
        (_says("", "CUDA error: an illegal address", -6), "with -6: CUDA error: an illegal"),
        (_says("not JSON"), "ended with 0: it printed nothing"),
        (_hangs, "did not end within"),
    ],
)
def test_auto_serves_from_the_cpu_if_they_are_not(
    child: Callable[[Answer], None], answer: Answer, why: str
) -> None:
    child(answer)
    choice = gpu.choose_gpu("auto")
    assert choice.gpu is None
    assert choice.why_not.startswith("a card: ")
    assert why in choice.why_not


@pytest.mark.parametrize(("device", "found"), [("cuda", CARD), ("cpu", None)])
def test_what_is_asked_for_is_not_tested(
    child: Callable[[Answer], None], device: Any, found: Gpu | None
) -> None:
    child(_never)
    assert gpu.choose_gpu(device) == gpu.DeviceChoice(found)


@pytest.mark.parametrize("works", [True, False])
def test_the_engine_runs_where_its_memory_was_planned(
    works: bool, child: Callable[[Answer], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    child(_says(json.dumps({**RIGHT, "why": "" if works else "norm: wrong"})))
    monkeypatch.setattr(startup, "find_gpu", gpu.find_gpu)
    config = load_config({"device": "auto", "kv_cache_bytes": "1MiB"}, {})
    plan = startup.memory_for(CONFIG, config)
    again = startup.replan(CONFIG, config, plan, 1 << 28, 1 << 28)
    names = [[pool.name for pool in each.pools] for each in (plan, again)]
    assert names == [["host", "device"]] * 2 if works else [["host"]] * 2
    fingerprint = BaseFingerprint("00" * 32, "00" * 32)
    base = BaseSpec("tiny", CONFIG.num_layers, CONFIG.shapes, fingerprint)
    made = startup.engine_config(config, BaseFolder("tiny", tmp_path), base, plan)
    assert made.device == ("cuda" if works else "cpu")


def test_the_doctor_says_what_the_self_test_found() -> None:
    right = cuda_check(RIGHT, chosen=False)
    assert right.status == "ok"
    assert "sm_90" in right.found
    assert "triton 3.6" in right.found
    broken = {**RIGHT, "why": "nf4: 3 numbers are wrong"}
    for chosen in (True, False):
        wrong = cuda_check(broken, chosen=chosen)
        assert wrong.status == "problem"
        assert "nf4: 3 numbers" in wrong.found
        assert ("serves from the CPU" in wrong.found) is not chosen
    assert cuda_check({"why": "it printed nothing"}, chosen=True).status == "problem"
