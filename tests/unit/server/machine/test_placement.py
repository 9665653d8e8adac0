"""How many threads a step gets and where, over FAKE machines; the calls to Linux are real."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from veneer_server.system.cores import Machine, cpu_list
from veneer_server.system.placement import Placement, place

from tests.unit.server.machine.fake_topology import FakeTopology

GIB = 1 << 30
SMT = [[(cpu, cpu + 8) for cpu in range(8)]]
"""One package of 8 cores of 2 CPUs each."""
TWO = [[(0, 8), (1, 9), (2, 10), (3, 11)], [(4, 12), (5, 13), (6, 14), (7, 15)]]
FIRST, SECOND = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
"""Two packages of 4 cores, and their CPUs."""

Placed = Callable[..., Placement]


@pytest.fixture
def placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Placed:
    def choose(
        packages: Iterable[Iterable[Iterable[int]]],
        memory: Any = None,
        *,
        wanted: int = 0,
        mask: Iterable[int] = range(16),
        **limits: Any,
    ) -> Placement:
        made = FakeTopology(tmp_path / "machine", packages, memory, **limits)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(mask))
        return place(wanted, Machine.here(made.sys, made.proc, made.cgroups))

    return choose


def test_auto_is_a_thread_for_each_physical_core_bound_to_its_cpus(placed: Placed) -> None:
    found = placed(SMT)
    assert found.threads == 8
    assert found.bound == tuple((cpu, cpu + 8) for cpu in range(8))
    assert "8 physical cores, 16 CPUs" in found.why
    # The other numbers that may be faster: all CPUs, and half of the cores.
    assert found.others == (16, 4)
    assert (found.cpus, found.nodes) == (frozenset(), ())


def test_where_there_is_nothing_to_choose_nothing_is_bound(placed: Placed) -> None:
    found = placed([[(cpu,) for cpu in range(4)]], mask=range(4))
    assert (found.threads, found.bound, found.cpus, found.others) == (4, (), frozenset(), ())


def test_cores_of_which_the_process_may_use_one_cpu_are_cores(placed: Placed) -> None:
    """As in a container whose CPU set has no siblings."""
    found = placed(SMT, mask=(1, 3, 5, 15))
    assert (found.threads, found.bound) == (4, ())


def test_two_cpus_of_one_core_are_one_thread_until_two_are_faster(placed: Placed) -> None:
    found = placed(SMT, mask=(0, 8))
    assert (found.threads, found.bound, found.others) == (1, ((0, 8),), (2,))


def test_a_quota_below_the_cores_binds_nothing(placed: Placed) -> None:
    """Dozens of such containers on a machine would all be bound to its first cores."""
    memory = {0: (FIRST, 8 * GIB, GIB), 1: (SECOND, 8 * GIB, GIB)}
    found = placed(TWO, memory, quota=2.5)
    assert (found.threads, found.bound, found.cpus, found.nodes) == (2, (), frozenset(), ())
    assert "quota is 2.5 CPUs" in found.why


def test_a_quota_bounds_what_else_is_tried(placed: Placed) -> None:
    found = placed(SMT, quota=12)
    assert (found.threads, found.others) == (8, (12, 4))


def test_auto_stays_on_the_package_with_most_free_memory(placed: Placed) -> None:
    """So a second server goes to the other one."""
    memory = {0: (FIRST, 8 * GIB, GIB), 1: (SECOND, 8 * GIB, 6 * GIB)}
    found = placed(TWO, memory)
    assert found.threads == 4
    assert found.cpus == frozenset(SECOND)
    assert found.bound == ((4, 12), (5, 13), (6, 14), (7, 15))
    assert found.nodes == ()  # memory of the one node next to them: touched there, it is local
    assert "of package 1, one of 2" in found.why


def test_a_mask_of_one_package_is_kept_to(placed: Placed) -> None:
    memory = {0: (FIRST, 8 * GIB, GIB), 1: (SECOND, 8 * GIB, 6 * GIB)}
    found = placed(TWO, memory, mask=FIRST)
    assert found.bound == ((0, 8), (1, 9), (2, 10), (3, 11))
    assert found.cpus == frozenset()


def test_memory_of_a_package_with_several_nodes_is_spread_over_them(placed: Placed) -> None:
    memory = {
        0: ((0, 1, 8, 9), 4 * GIB, 4 * GIB),
        1: ((2, 3, 10, 11), 4 * GIB, 4 * GIB),
        2: (SECOND, 8 * GIB, GIB),
    }
    found = placed(TWO, memory)
    assert (found.threads, found.nodes) == (4, (0, 1))


def test_an_operator_s_number_is_not_bound(placed: Placed) -> None:
    memory = {0: (FIRST, 8 * GIB, GIB), 1: (SECOND, 8 * GIB, GIB)}
    found = placed(TWO, memory, wanted=4)
    assert found == Placement(4, "set by --threads")


def test_threads_on_several_packages_spread_memory_over_the_nodes_allowed(
    placed: Placed,
) -> None:
    memory = {
        0: (FIRST, 8 * GIB, GIB),
        1: (SECOND, 8 * GIB, GIB),
        2: (SECOND, 8 * GIB, GIB),
        3: (SECOND, 0, 0),  # without memory
    }
    found = placed(TWO, memory, wanted=8, memory_allowed="0-1,3")
    assert (found.threads, found.bound, found.nodes) == (8, (), (0, 1))
    assert "memory is interleaved" in found.why


def test_without_sys_each_cpu_is_a_core(placed: Placed) -> None:
    found = placed([], mask=range(3))
    assert (found.threads, found.bound) == (3, ())


@pytest.mark.parametrize("damage", ["", "0-", "x,y", "-1", "0-99999999999", "\x00"])
def test_a_damaged_sys_counts_cpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    made = FakeTopology(tmp_path, [[(0,), (1,)]], {0: ((0, 1), GIB, GIB)})
    for file in made.sys.rglob("*"):
        if file.is_file():
            file.write_text(damage)
    (made.proc / "self" / "status").write_text(f"Mems_allowed_list:\t{damage}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    found = place(0, Machine.here(made.sys, made.proc, made.cgroups))
    assert (found.threads, found.bound, found.nodes) == (2, (), ())


def test_a_list_of_cpus() -> None:
    assert cpu_list("0-2,8,10-11\n") == {0, 1, 2, 8, 10, 11}
    assert cpu_list("") == set()


def test_this_machine(tmp_path: Path) -> None:
    found = place(0)
    assert 1 <= found.threads <= len(os.sched_getaffinity(0))


# ------------------------------------------------------- the calls to Linux, each in a process

SPREAD = """
import mmap, os
from pathlib import Path
from veneer_server.system.numa import spread_memory, stay_on
{before}
refused = spread_memory([0])
page = mmap.mmap(-1, 1 << 21)
page[0] = 1
maps = Path("/proc/self/numa_maps")
spread = maps.exists() and "interleave:0" in maps.read_text()
print(refused or "spread", spread, stay_on(os.sched_getaffinity(0)) or "stays")
print(stay_on([60_000]))
"""

DENY = """
import ctypes, struct
class Filter(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
numbers = {238, 237}
program = struct.pack("HBBI", 0x20, 0, 0, 0)  # the call's number
for left, number in zip((1, 0), sorted(numbers), strict=True):
    program += struct.pack("HBBI", 0x15, left, 0 if left else 1, number)
program += struct.pack("HBBI", 0x06, 0, 0, 0x00050001)  # EPERM
program += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # else allowed
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
given = Filter(len(program) // 8, program)
assert libc.prctl(22, 2, ctypes.byref(given)) == 0, ctypes.get_errno()
"""


def run(before: str = "") -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SPREAD.format(before=before)],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_memory_is_spread_by_a_system_call() -> None:
    spread, stays = run()
    # A kernel without NUMA says so; one with a single node does it, which changes nothing.
    if Path("/proc/self/numa_maps").exists():
        assert spread == "spread True stays"
    else:
        assert spread.startswith("set_mempolicy: ")
    assert stays.startswith("sched_setaffinity: ")


def test_a_container_that_refuses_the_call_breaks_nothing() -> None:
    """Docker's seccomp filter refuses set_mempolicy with EPERM."""
    spread, _ = run(DENY)
    assert spread == "set_mempolicy: Operation not permitted False stays"
