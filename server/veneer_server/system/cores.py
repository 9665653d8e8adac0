"""The cores that this process may use, and the memory next to them: Linux's ``/sys`` and
``/proc``.

A core has one CPU, or several that share its units (SMT). Cores of one package (a socket) share
the last cache and are next to the package's memory, which is one NUMA node or several. Where
``/sys`` says nothing, each CPU is a core, and there is one package.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from veneer_server.system.machine import cpu_quota

_SYS: Final = Path("/sys/devices/system")
_PROC: Final = Path("/proc")
_MOST: Final = 1 << 16
"""Limit of CPU numbers in a list; a list with a larger number is treated as damaged."""


@dataclass(frozen=True, slots=True)
class CpuCore:
    """A physical core.

    Attributes:
        cpus: its CPUs that the process may use, ascending; never empty.
        package: a number that cores of one package share.
    """

    cpus: tuple[int, ...]
    package: int


@dataclass(frozen=True, slots=True)
class Machine:
    """The part of this machine that the process may use.

    Attributes:
        cores: ascending by their first CPU.
        quota: CPU time that its container allows, in CPUs, or None.
        memory: for each package with such cores, its NUMA nodes with memory that the process
            may use.
        free: bytes of free memory of each NUMA node.
    """

    cores: tuple[CpuCore, ...]
    quota: float | None
    memory: dict[int, tuple[int, ...]]
    free: dict[int, int]

    @staticmethod
    def here(sys: Path = _SYS, proc: Path = _PROC, cgroups: Path | None = None) -> Machine:
        """This machine, as the calling thread may use it now."""
        allowed = os.sched_getaffinity(0)
        quota = cpu_quota(proc=proc) if cgroups is None else cpu_quota(cgroups, proc)
        by_siblings: dict[tuple[int, ...], CpuCore] = {}
        for cpu in sorted(allowed):
            topology = sys / "cpu" / f"cpu{cpu}" / "topology"
            siblings = cpu_list(_text(topology / "thread_siblings_list")) & allowed | {cpu}
            key = tuple(sorted(siblings))
            package = _text(topology / "physical_package_id")
            # Some machines say -1 for unknown.
            by_siblings.setdefault(key, CpuCore(key, int(package) if package.isdigit() else 0))
        memory, free = _memory(tuple(by_siblings.values()), sys, proc)
        return Machine(tuple(by_siblings.values()), quota, memory, free)


def _memory(
    cores: tuple[CpuCore, ...], sys: Path, proc: Path
) -> tuple[dict[int, tuple[int, ...]], dict[int, int]]:
    allowed = None
    for line in _text(proc / "self" / "status").splitlines():
        if line.startswith("Mems_allowed_list:"):
            allowed = cpu_list(line.partition(":")[2])
    package_of = {cpu: core.package for core in cores for cpu in core.cpus}
    nodes: dict[int, list[int]] = {}
    free = {}
    for node, folder in _nodes(sys):
        facts = {}
        for line in _text(folder / "meminfo").splitlines():  # "Node 0 MemFree:  123 kB"
            words = line.split()
            if len(words) >= 4 and words[3].isdigit():
                facts[words[2].rstrip(":")] = int(words[3]) * 1024
        if facts.get("MemTotal", 0) == 0 or (allowed and node not in allowed):
            continue
        free[node] = facts.get("MemFree", 0)
        for package in {
            package_of[cpu] for cpu in cpu_list(_text(folder / "cpulist")) if cpu in package_of
        }:
            nodes.setdefault(package, []).append(node)
    return {package: tuple(sorted(found)) for package, found in nodes.items()}, free


def _nodes(sys: Path) -> Iterator[tuple[int, Path]]:
    try:
        folders = list((sys / "node").glob("node*"))
    except OSError:
        return
    for folder in folders:
        number = folder.name.removeprefix("node")
        if number.isdigit():
            yield int(number), folder


def cpu_list(text: str) -> set[int]:
    """Parse a list as Linux writes it, such as ``0-3,8``; empty if it is not one."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if not first.isdigit() or not (last or first).isdigit():
            return set()
        if int(last or first) >= _MOST:
            return set()
        found.update(range(int(first), int(last or first) + 1))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""
