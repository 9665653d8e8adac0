"""FAKE: the files of /sys and /proc that say which cores and memory a machine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


class FakeTopology:
    """A machine in files; `sys` and `proc` are given to `Machine.here`.

    Args:
        packages: of each, its cores, each with its CPUs.
        memory: of each NUMA node, its CPUs, total and free bytes.
        quota: CPUs' worth of time, of a container's cgroup.
    """

    def __init__(
        self,
        root: Path,
        packages: Iterable[Iterable[Iterable[int]]],
        memory: Mapping[int, tuple[Iterable[int], int, int]] | None = None,
        *,
        quota: float | None = None,
        memory_allowed: str = "",
    ) -> None:
        self.sys, self.proc, self.cgroups = root / "sys", root / "proc", root / "cgroup"
        for number, cores in enumerate(packages):
            for core in cores:
                cpus = list(core)
                for cpu in cpus:
                    folder = self.sys / "cpu" / f"cpu{cpu}" / "topology"
                    folder.mkdir(parents=True)
                    listed = ",".join(map(str, cpus))
                    (folder / "thread_siblings_list").write_text(f"{listed}\n")
                    (folder / "physical_package_id").write_text(f"{number}\n")
        for node, (cpus_of, total, free) in (memory or {}).items():
            folder = self.sys / "node" / f"node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(",".join(map(str, cpus_of)) + "\n")
            (folder / "meminfo").write_text(
                f"Node {node} MemTotal:       {total >> 10} kB\n"
                f"Node {node} MemFree:        {free >> 10} kB\n"
                f"Node {node} HugePages_Total:     0\n"
            )
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text("0::/\n")
        (self.proc / "self" / "status").write_text(
            f"Name:\tx\nMems_allowed_list:\t{memory_allowed}\n"
            if memory_allowed
            else "Name:\tx\n"
        )
        self.cgroups.mkdir()
        limit = "max" if quota is None else str(int(quota * 100_000))
        (self.cgroups / "cpu.max").write_text(f"{limit} 100000\n")
