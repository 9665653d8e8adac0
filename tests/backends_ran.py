"""Record which backends the suite's engines ran with, and check them against the machine.

Native is the default, with torch as the fallback: with a broken compiler the whole suite would
test the torch backend and pass. So wherever CPU and compiler allow it, an engine that was not
explicitly set to torch must be native, or its test fails (`check`); a test of the kernels does
not skip there (`skip_or_fail`); and a run of the whole suite (``--whole``, as in ``make test``)
without a native engine fails at its end. With ``CI`` set, such a run fails even on a machine
that cannot run the native backend. This module detects what the machine can do with its own
code, not with the product's.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
import pytest
from veneer_server.wire.messages import EngineConfig

RAN: Counter[str] = Counter()
"""Engines of this process and servers that it started, by backend."""

_ASKED: Final = ("VENEER_BACKEND", "VENEER_NATIVE_INSTRUCTIONS", "VENEER_THREADS")
"""Environment variables with which the whole suite may be run. Engines and servers that a test
starts obey them, unless the test sets something else."""


@functools.cache
def native_possible() -> bool:
    """Return whether the native backend must run here: AVX2 with FMA, and a compiler."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return False
    flags = next((line.split() for line in text.splitlines() if line.startswith("flags")), [])
    compiler = any(map(shutil.which, ("c++", "g++", "clang++")))
    return {"avx2", "fma"} <= set(flags) and compiler


def skip_or_fail(reason: object) -> NoReturn:
    """Skip the test if this machine cannot compile and run the kernels; otherwise fail it."""
    if native_possible():
        pytest.fail(f"this machine has AVX2 and a compiler, but: {reason}")
    pytest.skip(str(reason))


def asked() -> dict[str, str]:
    """Return those of the variables that are set."""
    return {name: os.environ[name] for name in _ASKED if os.environ.get(name)}


def server_environment() -> dict[str, str]:
    """Return the environment for a server that a test starts: the suite's, with only those of
    Veneer's variables with which the suite may be run."""
    others = {k: v for k, v in os.environ.items() if not k.startswith("VENEER_")}
    return others | asked()


def with_asked(config: EngineConfig) -> EngineConfig:
    """Return the config of an engine inside a test, with the suite's variables applied."""
    given = asked()
    changes: dict[str, Any] = {}
    if config.backend == "auto" and "VENEER_BACKEND" in given:
        changes["backend"] = given["VENEER_BACKEND"]
    if config.native_instructions == "auto" and "VENEER_NATIVE_INSTRUCTIONS" in given:
        changes["native_instructions"] = given["VENEER_NATIVE_INSTRUCTIONS"]
    if config.threads == 0 and "VENEER_THREADS" in given:
        changes["threads"] = int(given["VENEER_THREADS"])
    return msgspec.structs.replace(config, **changes)


def check(backend: str, *, torch_wanted: bool, why: str = "") -> None:
    """Count an engine; fail if it fell back to torch although this machine can run native."""
    RAN[backend] += 1
    if not torch_wanted and native_possible() and not backend.startswith("native"):
        raise AssertionError(f"the engine fell back to {backend}: {why}")


def check_ready_line(line: str, flags: Iterable[str]) -> None:
    """Apply `check` to a server, from its ready line."""
    _, _, rest = line.partition("backend=")
    given = " ".join(flags).replace("=", " ").split()
    values = dict(pairwise(given))
    if values.get("--role") == "registry":
        return  # it has no engine
    torch_wanted = (
        asked().get("VENEER_BACKEND") == "torch"
        or values.get("--backend") == "torch"
        or values.get("--dtype", "bfloat16") != "bfloat16"
    )
    name = rest.partition("  ")[0].partition(" (several")[0]  # without why it is slower
    check(name.strip(), torch_wanted=torch_wanted, why=line)


def missing(ran: Mapping[str, int]) -> str:
    """Return what is wrong with the backends of a whole run, or ""."""
    if asked().get("VENEER_BACKEND") == "torch":
        return ""
    if not native_possible():
        where = "CI needs a machine that can run the native backend: AVX2, FMA, a C++ compiler"
        return where if os.environ.get("CI") else ""
    wanted = asked().get("VENEER_NATIVE_INSTRUCTIONS", "")
    if any(name.startswith("native") and wanted in name for name in ran):
        return ""
    return f"no engine ran with the native backend {wanted}, which this machine can run".strip()
