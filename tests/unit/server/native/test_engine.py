"""A decoder's threads: where they run, and how many there are."""

from __future__ import annotations

import itertools
import os
import threading
from pathlib import Path

import pytest
import torch
from veneer_server.backends.native.library import Library
from veneer_server.engine.execution import faster as module
from veneer_server.engine.execution.faster import faster, settle
from veneer_server.system.placement import Placement

from tests.unit.server.native.model_kit import Served, make_base

TASKS = Path("/proc/self/task")
NOWHERE = 60_000
"""A CPU that no machine has."""


@pytest.fixture
def served(library: Library) -> Served:
    generator = torch.Generator().manual_seed(5)
    return Served.over(library, make_base(generator), threads=2)


def step(served: Served) -> torch.Tensor:
    return served.rows([([3, 1, 4], 0, [1], None)], range(3))


def tasks() -> set[str]:
    return {task.name for task in TASKS.iterdir()}


def allowed(task: str) -> str:
    lines = (TASKS / task / "status").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("Cpus_allowed_list"))


@pytest.mark.verify
def test_results_do_not_depend_on_the_threads(served: Served) -> None:
    logits = step(served)
    cpu = min(os.sched_getaffinity(0))
    for threads, bound in ((1, ()), (1, ((cpu,),)), (3, ()), (3, ((cpu,),) * 3), (5, ())):
        served.decoder.use(served.decoder.engine(threads, bound))
        assert torch.equal(step(served), logits)


def test_threads_run_on_the_cpus_that_they_are_bound_to(served: Served) -> None:
    cpus = sorted(os.sched_getaffinity(0))[-2:]
    before = tasks()
    engine = served.decoder.engine(3, [cpus[:1], cpus[-1:], cpus])
    assert engine.refused == 0
    listed = {str(cpus[-1]), ",".join(map(str, cpus)), "-".join(map(str, cpus))}
    assert {allowed(task) for task in tasks() - before} <= listed
    assert len(tasks() - before) == 2
    engine.close()
    assert tasks() <= before


def test_the_thread_that_calls_is_bound_during_steps_only(served: Served) -> None:
    """What it starts at other times, such as loaders, may run anywhere."""
    mine = os.sched_getaffinity(0)
    cpu = max(mine)
    served.decoder.use(served.decoder.engine(2, [[cpu], [cpu]]))
    own, seen, over = str(threading.get_native_id()), threading.Event(), threading.Event()

    def watch() -> None:
        while not over.is_set() and not seen.is_set():
            if allowed(own) == str(cpu):
                seen.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in itertools.takewhile(lambda _: not seen.is_set(), range(200_000)):
            step(served)
            assert os.sched_getaffinity(0) == mine
    finally:
        over.set()
        watcher.join()
    assert seen.is_set()


def test_the_thread_that_ends_an_engine_is_not_bound_afterwards(served: Served) -> None:
    mine = os.sched_getaffinity(0)
    served.decoder.engine(2, [[max(mine)], [min(mine)]]).close()
    assert os.sched_getaffinity(0) == mine


def test_a_cpu_that_is_gone_leaves_its_thread_free(served: Served) -> None:
    """As when a container's set of CPUs changes between the look at it and the start."""
    logits, mine = step(served), os.sched_getaffinity(0)
    before = tasks()
    engine = served.decoder.engine(2, [[NOWHERE], [NOWHERE]])
    assert engine.refused == 2
    assert len({allowed(task) for task in (tasks() - before) | {str(os.getpid())}}) == 1
    served.decoder.use(engine)
    assert torch.equal(step(served), logits)
    assert os.sched_getaffinity(0) == mine


# ----------------------------------------------------------------- how many, by measurement


def fake_steps(took: dict[int, float]) -> tuple[list[int], object, object]:
    """FAKE: a clock that only steps move on; returns also what ran."""
    ran: list[int] = []
    now = [0.0]

    def seconds(threads: int) -> float:
        ran.append(threads)
        now[0] += took[threads]
        return took[threads]

    return ran, seconds, lambda: now[0]


@pytest.mark.parametrize(
    ("took", "others", "best"),
    [
        ({16: 0.004, 8: 0.0038, 4: 0.001}, (8, 4), 16),  # hardly faster: not clearly
        ({16: 0.004, 8: 0.003, 4: 0.005}, (8, 4), 8),
        ({16: 0.004, 8: 0.003, 4: 0.002}, (8, 4), 4),
        ({16: 0.004, 32: 0.003, 8: 0.001}, (32, 8), 32),  # more are faster, so fewer are not
        ({16: 0.004, 32: 0.005, 8: 0.002, 4: 0.003}, (32, 8, 4), 8),
        ({16: 0.2, 8: 0.01}, (8,), 16),  # a step so long has work for all
        ({16: 0.09, 32: 5.0}, (32,), 16),  # one slow try ends it
    ],
)
def test_another_number_is_used_where_it_is_clearly_faster(
    took: dict[int, float], others: tuple[int, ...], best: int
) -> None:
    _, seconds, clock = fake_steps(took)
    found, least = faster(16, others, seconds, clock)  # type: ignore[arg-type]
    assert found == best
    assert all(least[threads] == took[threads] for threads in least)


def test_measuring_ends_within_a_second() -> None:
    took = {16: 0.09, 32: 0.09, 8: 0.09, 4: 0.09}
    ran, seconds, clock = fake_steps(took)
    faster(16, (32, 8, 4), seconds, clock)  # type: ignore[arg-type]
    assert sum(took[each] for each in ran) < 1


def test_a_start_measures_and_says_what_it_chose(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real steps; which number is faster here is not for a test to say."""
    monkeypatch.setattr(module, "LONGEST_S", float("inf"))
    monkeypatch.setattr(module, "BUDGET_S", float("inf"))
    logits, before = step(served), len(tasks())
    placement = Placement(2, "two cores", others=(3, 1))
    found = settle(served.decoder, placement, served.block_size)
    assert found.why.startswith("two cores; steps of 1 and of 8 tokens took ")
    assert " ms with 2, " in found.why
    assert " ms with 3" in found.why
    assert len(tasks()) == before - 2 + found.threads  # those of the others have ended
    assert torch.equal(step(served), logits)
    assert found.others == ()


def test_threads_that_cannot_be_started_are_not_compared(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_S", float("inf"))
    logits = step(served)
    # FAKE: more threads than an engine can number, in place of a limit on processes.
    found = settle(served.decoder, Placement(2, "two", others=(-1,)), served.block_size)
    assert found.threads == 2
    assert "not compared" in found.why
    assert torch.equal(step(served), logits)
