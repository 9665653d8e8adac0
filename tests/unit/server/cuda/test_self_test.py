"""The self-test that decides whether a card serves, interpreted on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.places import REPOSITORY

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="triton is published for Linux alone"
)

PROGRAM = """
import json, tests.gpu.interpreter as interpreter
interpreter.allow([(0, 1 << 63)])
import torch
from veneer_server.backends.cuda.self_test import cases, report
device = torch.device("cpu")
right = report.run(device)
def zeros(*arguments): arguments[-2].zero_()
def fails(*arguments): raise RuntimeError("PTX was too new\\nfor this driver")
cases.norm.normalize, cases.gate.gate = zeros, fails
for name in set(cases.CASES) - {"norm", "gate"}:
    del cases.CASES[name]
print(json.dumps([right.wrong, right.checked, report.run(device).wrong]))
"""


def test_right_kernels_pass_and_wrong_ones_do_not() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    wrong, checked, planted = json.loads(done.stdout.splitlines()[-1])
    assert wrong == {}
    assert len(checked) == 8
    assert set(planted) == {"norm", "gate"}
    assert "numbers are wrong" in planted["norm"]
    assert planted["gate"] == "RuntimeError: PTX was too new"


def test_without_a_card_it_says_so() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "veneer_server.backends.cuda.self_test"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert json.loads(told)["why"] == "torch finds no CUDA device"
