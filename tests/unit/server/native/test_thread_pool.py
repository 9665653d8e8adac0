"""What the thread pool does for each thread does not grow with the number of threads. That it
computes the right thing is checked by ``make sanitize`` and the tests of whole steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.thread_pool import Pool


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return Pool(Path(tmp_path_factory.mktemp("pool")))


@pytest.mark.push
def test_operations_of_a_thread_do_not_grow_with_the_number_of_threads(pool: Pool) -> None:
    # Counts: of 8 own chunks and the phase's beginning and end, in lockstep. The pool before
    # decision 70, which looked at every thread's share, made 73 and 145.
    few, many = pool.counts(8, phases=20), pool.counts(64, phases=20)
    assert many.operations / 64 < 1.1 * few.operations / 8
    assert many.exchanges / 64 < 1.1 * few.exchanges / 8
    assert many.cuts == 2 * 64


def test_two_threads_do_not_pay_for_it(pool: Pool) -> None:
    assert pool.counts(2).operations / 2 < 59  # as many as before decision 70


def test_a_thread_that_waits_leaves_its_core_to_others(pool: Pool) -> None:
    # It waited for a thread that was preempted, perhaps on this core: spinning took all of it.
    # A busy machine makes the shares smaller.
    assert max(pool.waiting()) < 0.5
