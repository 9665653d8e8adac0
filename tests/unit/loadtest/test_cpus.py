"""CPUs of the spawned server and of the client."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
from veneer_loadtest.cpus import Cpus, during, parse_cpus
from veneer_loadtest.errors import BadOption

from tests.refused import refused

ALL = sorted(os.sched_getaffinity(0))
NONE = max(ALL) + 1


def test_each_has_its_own() -> None:
    first, last = ALL[0], ALL[-1]
    assert parse_cpus("") is None
    assert parse_cpus(f"{first}/{last}") == Cpus(frozenset({first}), frozenset({last}))
    assert parse_cpus(f"{first}-{first},{last}/{last}") == Cpus(
        frozenset({first, last}), frozenset({last})
    )


@pytest.mark.parametrize("text", ["0", "/", "0/", "/0", "a/b", "0-/1", "1-0/0", f"0/{NONE}"])
def test_what_cannot_be_is_refused(text: str) -> None:
    with refused(BadOption, field="cpus"):
        parse_cpus(text)


def test_all_threads_and_new_processes_are_kept_there_and_let_go() -> None:
    one = frozenset({ALL[0]})
    told: list[set[int]] = []
    go, done = threading.Event(), threading.Event()

    def work() -> None:
        go.wait()
        told.append(os.sched_getaffinity(0))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    with during(one):
        asked = "import os; print(sorted(os.sched_getaffinity(0)))"
        child = subprocess.check_output([sys.executable, "-c", asked], text=True)
        go.set()
        done.wait()
    thread.join()
    assert (child.strip(), told) == (str([ALL[0]]), [set(one)])
    assert sorted(os.sched_getaffinity(0)) == ALL
