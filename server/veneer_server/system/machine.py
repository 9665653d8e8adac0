"""Resources of this machine: cores, memory, a GPU; respects a container's limits.

No torch here. A separate process queries the GPU: the front never imports torch, and
a broken CUDA installation may crash the process that queries it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from veneer_registry.child_python import child_python

_CGROUPS: Final = Path("/sys/fs/cgroup")
_PROC: Final = Path("/proc")
_DRIVERS: Final = (Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of these exists if there is an NVIDIA driver (the second under WSL)."""

_ASK_GPU: Final = (
    "import torch\n"
    "if torch.cuda.is_available():\n"
    "    free, total = torch.cuda.mem_get_info(0)\n"
    "    print(torch.cuda.get_device_name(0), total, free, sep='|')\n"
)


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Memory of the machine or its container, in bytes.

    Attributes:
        limit: the most that the process may use.
        available: free now, including reclaimable page cache.
        contained: whether the limit is a container's (cgroup v2 ``memory.max``).
    """

    limit: int
    available: int
    contained: bool


@dataclass(frozen=True, slots=True)
class Gpu:
    """The first CUDA device; sizes in bytes."""

    name: str
    total: int
    free: int


def usable_cores(cgroups: Path = _CGROUPS, proc: Path = _PROC) -> int:
    """Cores that threads may fill: the process's affinity, or less if a container has a
    quota (cgroup v2 ``cpu.max``), rounded down: once a quota is used up, all threads stop
    until its next period."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota(cgroups, proc)
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota(cgroups: Path = _CGROUPS, proc: Path = _PROC) -> float | None:
    """CPU time that the container allows, in CPUs (cgroup v2 ``cpu.max``), or None."""
    quotas = []
    for group in _own_groups(cgroups, proc):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit() and int(period):
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def host_memory(cgroups: Path = _CGROUPS, proc: Path = _PROC) -> HostMemory:
    """Memory of the machine, or less if a container limits it."""
    facts = _key_values(proc / "meminfo")
    total = facts.get("MemTotal", 0)
    limit, available = total, facts.get("MemAvailable", total)
    for group in _own_groups(cgroups, proc):
        most, used = _read(group / "memory.max"), _read(group / "memory.current")
        if most.isdigit() and int(most) < total:
            limit = min(limit, int(most))
            # Page cache counts as used there, but is reclaimed when memory is needed.
            cache = _key_values(group / "memory.stat").get("inactive_file", 0)
            free = int(most) - int(used or 0) + cache
            available = max(0, min(available, free))
    return HostMemory(limit, available, contained=limit < total)


def peak_bytes(pid: int | Literal["self"], proc: Path = _PROC) -> int:
    """Largest resident set of a process so far; 0 if it cannot be read."""
    return _key_values(proc / str(pid) / "status").get("VmHWM", 0)


def find_gpu(device: Literal["auto", "cpu", "cuda"]) -> Gpu | None:
    """The GPU that the engine would use, or None. Takes seconds if there may be one."""
    if device == "cpu" or (device == "auto" and not any(d.exists() for d in _DRIVERS)):
        return None
    done = subprocess.run(
        child_python("-c", _ASK_GPU), capture_output=True, text=True, check=False
    )
    name, _, numbers = done.stdout.strip().partition("|")
    total, _, free = numbers.partition("|")
    return Gpu(name, int(total), int(free)) if total and free else None


def _own_groups(cgroups: Path, proc: Path) -> Iterator[Path]:
    """The folders of this process's cgroup and its ancestors, each of which may set limits."""
    for line in _read(proc / "self" / "cgroup").splitlines():
        if line.startswith("0::"):
            inside = Path(line.removeprefix("0::").lstrip("/"))
            yield from (cgroups / part for part in (inside, *inside.parents))


def _key_values(path: Path) -> dict[str, int]:
    """Numbers of a file such as ``/proc/meminfo``; "kB" counts as 1024."""
    found = {}
    for line in _read(path).splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdigit():
            found[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
