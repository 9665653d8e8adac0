"""The number of threads of a step on a CPU, and the placement of them and their memory.

Rules, and why (docs/decisions/0070-threads-on-cores.md):

- ``--threads auto`` uses one thread for each physical core of one package, or as many as the
  container's quota allows.
- It binds them only if they fill the package: then another program could not have found a
  free core either. With a quota or fewer threads the system decides, since many containers
  on one machine would all be bound to its first cores.
- If a core is one CPU and there is one package and one NUMA node, there is nothing to
  choose, and nothing is bound.
- ``--threads N`` is the operator's choice: nothing is bound.
- Memory is local if the threads stay next to one NUMA node, and is otherwise spread evenly over
  all nodes that they use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from veneer_server.system.cores import CpuCore, Machine

FEWEST = 4
"""Fewest threads that halving tries: with fewer, barriers cost less than half the work."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Threads of a step, and where they run.

    Attributes:
        threads: at least 1.
        why: in words, for the operator.
        bound: the CPUs of each thread; empty if the system decides.
        cpus: the CPUs of the whole engine process; empty if it may run anywhere.
        nodes: NUMA nodes over which memory is spread; empty if it is local.
        others: other numbers of threads that may be faster, see `engine.execution.faster`;
            they are never bound.
    """

    threads: int
    why: str
    bound: tuple[tuple[int, ...], ...] = ()
    cpus: frozenset[int] = frozenset()
    nodes: tuple[int, ...] = ()
    others: tuple[int, ...] = ()


def place(wanted: int, machine: Machine | None = None) -> Placement:
    """Choose the placement for ``--threads``; 0 is auto."""
    machine = machine or Machine.here()
    packages: dict[int, list[CpuCore]] = {}
    for core in machine.cores:
        packages.setdefault(core.package, []).append(core)
    largest = max(len(cores) for cores in packages.values())
    if wanted:
        every = tuple(sorted({node for nodes in machine.memory.values() for node in nodes}))
        spread = wanted > largest and len(every) > 1
        why = "set by --threads"
        if spread:
            why += f", more than the {largest} cores of a package: memory is interleaved"
        return Placement(wanted, why, nodes=every if spread else ())

    def room(package: int) -> tuple[int, int]:
        nodes = machine.memory.get(package, ())
        return len(packages[package]), sum(machine.free.get(node, 0) for node in nodes)

    # Among equal packages, the one with most free memory: a second server uses the other.
    package = max(sorted(packages), key=room)
    cores = packages[package]
    if machine.quota is not None and machine.quota < len(cores):
        threads = max(1, int(machine.quota))
        return Placement(threads, f"the container's quota is {machine.quota:g} CPUs")
    return _fill(machine, cores, package, others_packages=len(packages) > 1)


def _fill(
    machine: Machine, cores: Sequence[CpuCore], package: int, *, others_packages: bool
) -> Placement:
    """One thread for each core of a package."""
    cpus = frozenset(cpu for core in cores for cpu in core.cpus)
    nodes = machine.memory.get(package, ())
    siblings = len(cpus) > len(cores)
    why = f"{len(cores)} physical core{'s' if len(cores) > 1 else ''}"
    if siblings:
        why += f", {len(cpus)} CPUs"
    if others_packages:
        why += f", of package {package}, one of {len({c.package for c in machine.cores})}"
    placed = siblings or others_packages or len(nodes) > 1
    halves: list[int] = []
    while (half := (halves[-1] if halves else len(cores)) // 2) >= FEWEST:
        halves.append(half)
    all_cpus = len(cpus) if machine.quota is None else min(len(cpus), int(machine.quota))
    more = (all_cpus,) if siblings and all_cpus > len(cores) else ()
    return Placement(
        len(cores),
        why,
        bound=tuple(core.cpus for core in cores) if placed else (),
        cpus=cpus if others_packages else frozenset(),
        nodes=nodes if len(nodes) > 1 else (),
        others=(*more, *halves),
    )
