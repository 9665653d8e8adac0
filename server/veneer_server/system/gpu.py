"""Whether to serve from the GPU: it must be there, and compute what it should.

The self-test runs in a process of its own: a kernel that goes astray may end it, and the server
can still serve from the CPU.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from typing import Any, Final, Literal

from veneer_registry.child_python import child_python

from veneer_server.system.machine import Gpu, find_gpu

SELF_TEST: Final = "veneer_server.backends.cuda.self_test"
SECONDS: Final = 300
"""Compiling the kernels for the first time takes a part of a minute; they are kept."""


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """Attributes:
    gpu: what to serve from; None: the CPU.
    why_not: why a GPU that was found is not used; "" if it is, or none was found.
    """

    gpu: Gpu | None
    why_not: str = ""


def try_kernels() -> dict[str, Any]:
    """What the self-test says: ``why`` is empty if all kernels are right."""
    try:
        done = subprocess.run(
            child_python("-m", SELF_TEST),
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"why": f"the kernels' self-test did not end within {SECONDS} s"}
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        return {"why": f"the kernels' self-test ended with {done.returncode}: {last}"}
    return found


def choose_gpu(device: Literal["auto", "cpu", "cuda"]) -> DeviceChoice:
    """The GPU to serve from. ``auto`` takes one only if its kernels pass their self-test;
    ``cuda`` is taken at its word. Takes seconds if there may be a GPU."""
    gpu = find_gpu(device)
    if gpu is None or device != "auto":
        return DeviceChoice(gpu)
    why = str(try_kernels()["why"])
    return DeviceChoice(None, f"{gpu.name}: {why}") if why else DeviceChoice(gpu)
