"""Decides whether to serve from the GPU: it must exist, and its kernels must be correct.

The self-test runs in a separate process: a broken kernel may crash that process, and the server
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
"""Time limit of the self-test. Compiling the kernels for the first time takes a part of a
minute; later runs find them cached."""


@dataclass(frozen=True, slots=True)
class DeviceChoice:
    """The device to serve from.

    Attributes:
        gpu: the GPU to serve from; None for the CPU.
        why_not: why an existing GPU is not used; "" if it is used, or there is none.
    """

    gpu: Gpu | None
    why_not: str = ""


def try_kernels() -> dict[str, Any]:
    """Run the self-test and return its result; ``why`` is empty if all kernels are correct."""
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
    """Choose the GPU to serve from. ``auto`` takes one only if its kernels pass their
    self-test; ``cuda`` takes it without a test. Takes seconds if there may be a GPU."""
    gpu = find_gpu(device)
    if gpu is None or device != "auto":
        return DeviceChoice(gpu)
    why = str(try_kernels()["why"])
    return DeviceChoice(None, f"{gpu.name}: {why}") if why else DeviceChoice(gpu)
