"""`make demo` on the real base: what it says on the screen, and that it is so."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from veneer_server.config import load_config

from tests.places import REPOSITORY

pytestmark = pytest.mark.push

DEMO = REPOSITORY / "examples" / "demo.py"


@pytest.mark.real_base
async def test_the_demo_counts_what_it_claims(base_folder: Path) -> None:
    demo = await asyncio.create_subprocess_exec(
        sys.executable,
        DEMO,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await demo.communicate()
    told = out.decode()
    assert demo.returncode == 0, err.decode()
    assert "a toy of 135 M parameters" in told
    assert "the first 12 of 160 questions held out from training" in told
    assert "seccomp" in told
    counts = {
        name: (int(base), int(own))
        for name, base, own in re.findall(
            r"^(sql|code|chat): .*?(\d+) of \d+ +(\d+) of \d+", told, re.MULTILINE
        )
    }
    assert counts.keys() == {"sql", "code", "chat"}
    assert counts["sql"][1] >= counts["sql"][0] + 6, "of 12: the adapter that wins visibly"
    assert re.findall(r"^sql .* (right|wrong) *$", told, re.MULTILINE) == ["right", "right"]


def test_the_command_for_a_real_base_has_the_server_s_flags() -> None:
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = demo
    spec.loader.exec_module(demo)
    program, *flags = shlex.split(demo.REAL_BASE)
    assert program == "veneer-server"
    names = (flag.removeprefix("--").replace("-", "_") for flag in flags[::2])
    given = dict(zip(names, flags[1::2], strict=True))
    assert load_config(given, {}).base == "Qwen/Qwen3-1.7B"
    assert demo.REAL_BASE in (REPOSITORY / "README.md").read_text("utf-8")
