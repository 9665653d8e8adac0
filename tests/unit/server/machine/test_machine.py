"""A container's limits count, including those of its parent cgroups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from veneer_server.system.machine import find_gpu, host_memory, peak_bytes, usable_cores

MEMINFO = (
    "MemTotal:        8192 kB\nMemFree:  100 kB\nMemAvailable:    4096 kB\nHugePages_Total: 0\n"
)


class FakeSystem:
    """FAKE: the files of a cgroup tree and of /proc."""

    def __init__(self, root: Path, group: str = "/pod/app") -> None:
        self.cgroups, self.proc = root / "cgroup", root / "proc"
        self.group = self.cgroups / group.lstrip("/")
        self.group.mkdir(parents=True)
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(f"1:name=systemd:/x\n0::{group}\n")
        (self.proc / "meminfo").write_text(MEMINFO)

    def write(self, folder: Path, **files: str) -> None:
        for name, text in files.items():
            (folder / name.replace("__", ".")).write_text(text + "\n")


@pytest.fixture
def system(tmp_path: Path) -> FakeSystem:
    return FakeSystem(tmp_path)


def test_without_limits_the_machine_counts(system: FakeSystem) -> None:
    system.write(system.group, memory__max="max", cpu__max="max 100000")
    memory = host_memory(system.cgroups, system.proc)
    assert (memory.limit, memory.available, memory.contained) == (8 << 20, 4 << 20, False)
    assert usable_cores(system.cgroups, system.proc) == len(os.sched_getaffinity(0))


def test_a_memory_limit_counts_and_page_cache_is_free(system: FakeSystem) -> None:
    system.write(
        system.group,
        memory__max=str(2 << 20),
        memory__current=str(1 << 20),
        memory__stat=f"anon 1\ninactive_file {1 << 19}",
    )
    memory = host_memory(system.cgroups, system.proc)
    assert (memory.limit, memory.contained) == (2 << 20, True)
    assert memory.available == 3 << 19


def test_the_smallest_limit_of_all_groups_counts(system: FakeSystem) -> None:
    system.write(system.group, memory__max=str(4 << 20))
    system.write(system.group.parent, memory__max=str(3 << 20))
    assert host_memory(system.cgroups, system.proc).limit == 3 << 20


def test_a_limit_beyond_the_machine_is_none(system: FakeSystem) -> None:
    system.write(system.group, memory__max=str(1 << 40))
    assert not host_memory(system.cgroups, system.proc).contained


@pytest.mark.parametrize(
    ("quota", "cores"), [("150000 100000", 1), ("50000 100000", 1), ("100000 50000", 2)]
)
def test_a_cpu_quota_is_rounded_down_to_whole_cores(
    system: FakeSystem, quota: str, cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    system.write(system.group.parent, cpu__max=quota)
    assert usable_cores(system.cgroups, system.proc) == cores


def test_peak_memory_of_a_process() -> None:
    assert peak_bytes("self") > 10 << 20
    assert peak_bytes(os.getpid()) > 10 << 20
    assert peak_bytes(1 << 30) == 0


def test_no_gpu_is_asked_for_on_the_cpu() -> None:
    assert find_gpu("cpu") is None
