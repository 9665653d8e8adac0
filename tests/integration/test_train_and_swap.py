"""``examples/train_and_swap``, as a user runs it, with fewer steps."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.verify, pytest.mark.real_base, pytest.mark.timeout(1800)]

SCRIPT = Path(__file__).parents[2] / "examples" / "train_and_swap" / "run.py"


def test_from_data_to_a_live_adapter_and_a_swap() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "2"],
        stdout=subprocess.PIPE,  # stderr is pytest's, which shows it also after a timeout
        text=True,
        check=False,
    )
    assert done.returncode == 0
    answers = r"^(base model|while it trains|sql|chat) +(.*)\n +(\S+)"
    told = re.findall(answers, done.stdout, re.MULTILINE)
    who = [name for name, _, _ in told]
    assert who[0] == "base model"
    assert who[-3:] == ["sql", "chat", "sql"]
    first, chat, again = told[-3:]
    assert first[1:] == again[1:], "the same answer before and after another adapter's"
    assert first[2].startswith("sql@")
    assert chat[2].startswith("chat@")
    assert len({told[0][1], first[1], chat[1]}) == 3, "three sets of weights, three answers"
