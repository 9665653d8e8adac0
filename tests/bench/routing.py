"""Measure the cost of a routing decision: ``python -m tests.bench.routing``.

For each router, with the given numbers of replicas and adapters (popular by Zipf's law), it
measures this thread's CPU time for a decision and the end of its request, for a replica's
report, and for the decisions after a replica joins (each adapter's order is then computed again
when it is next needed).
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections import deque
from statistics import median

from veneer_server.routing.adapter_router import AdapterRouter
from veneer_server.routing.baselines import LeastLoaded, RandomChoice, RoundRobin
from veneer_server.routing.records import ReplicaReport, RoutedTo, Wanted
from veneer_server.routing.router import Router


def time_router(router: Router, replicas: int, adapters: int, requests: int) -> None:
    random_ = random.Random(1)
    for number in range(replicas):
        router.join(f"replica-{number}")
    sums = list(itertools.accumulate(1 / (n + 1) for n in range(adapters)))
    drawn = random_.choices(range(adapters), cum_weights=sums, k=requests)
    wanted = [Wanted(f"{number:064x}", work=64.0) for number in drawn]
    under_way: deque[RoutedTo] = deque()
    took: list[float] = []
    for number, each in enumerate(wanted):
        now = number / (2 * replicas)
        began = time.thread_time()
        under_way.append(router.choose(each, now))
        if len(under_way) > 2 * replicas:
            router.finished(under_way.popleft(), now)
        took.append(time.thread_time() - began)
    took = sorted(took[requests // 4 :])
    resident = [
        frozenset(f"{n:064x}" for n in random_.sample(range(adapters), 64)) for _ in range(2)
    ]
    reports = []
    for number in range(2 * replicas):
        began = time.thread_time()
        report = ReplicaReport(resident[number // replicas], 2)
        router.report(f"replica-{number % replicas}", report, now)
        reports.append(time.thread_time() - began)
    began = time.thread_time()
    router.join("new")
    joined = time.thread_time() - began
    print(
        f"{type(router).__name__:14} {1e6 * sum(took) / len(took):6.1f} us a decision on "
        f"average, {1e6 * median(took):.1f} in the middle, "
        f"{1e6 * took[int(0.999 * len(took))]:.0f} at p99.9; a report "
        f"{1e6 * median(reports):.1f} us, a join {1e3 * joined:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--adapters", type=int, default=100_000)
    parser.add_argument("--requests", type=int, default=200_000)
    given = parser.parse_args()
    print(f"{given.replicas} replicas, {given.adapters} adapters, Zipf(1)")
    for router in (AdapterRouter(), RandomChoice(1), RoundRobin(), LeastLoaded(1)):
        time_router(router, given.replicas, given.adapters, given.requests)


if __name__ == "__main__":
    main()
