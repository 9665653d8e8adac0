"""Measures, before serving and on the loaded base, whether another number of threads is faster.

One thread for each physical core is right for most bases and machines. But a step of a small
base has so little work for each of dozens of threads that half of them may be faster, and on
some CPUs two threads on a core get more done than one. So such alternatives are tried, if there
are any, for well under a second. Another number must be clearly faster, judged by the fastest
of its steps, since the choice stands until the next start and a machine is seldom quiet.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch

from veneer_server.backends.native.compiler import NativeUnavailable
from veneer_server.backends.native.decoder import NativeDecoder
from veneer_server.backends.native.engine import NativeEngine
from veneer_server.engine.execution.step_cost import tokens_after
from veneer_server.system.placement import Placement

CLEARLY: Final = 0.9
"""Another number of threads is used if its steps take less than this fraction of the time."""
ROUNDS: Final = 5
FEWEST_ROUNDS: Final = 2
LONGEST_S: Final = 0.1
"""Nothing is tried if steps take longer than this: each thread then has enough work, and trying
would take too long."""
BUDGET_S: Final = 0.6


def faster(
    first: int,
    others: Sequence[int],
    seconds: Callable[[int], float],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, dict[int, float]]:
    """Return the number of threads to use, and the least seconds of each number tried.

    Args:
        first: the number to use unless another one is clearly faster.
        others: numbers to try, in this order. Below ``first``, trying stops at the first one
            that is not clearly faster.
        seconds: runs steps with a number of threads and returns the seconds they took.
    """
    began = clock()
    best = first
    least = {first: seconds(first)}
    if least[first] > LONGEST_S:
        return best, least
    for other in others:
        if other < first and best > first:
            break  # more threads were faster, so fewer are not tried
        rounds = 0
        tried = float("inf")
        while rounds < ROUNDS and clock() - began < BUDGET_S:
            # Alternate, so that other load on the machine affects both.
            tried = min(tried, seconds(other))
            least[best] = min(least[best], seconds(best))
            rounds += 1
        if rounds < FEWEST_ROUNDS:
            break
        least[other] = tried
        if tried < CLEARLY * least[best]:
            best = other
        elif other < first:
            break
    return best, least


@torch.inference_mode()
def settle(decoder: NativeDecoder, placement: Placement, block_size: int) -> Placement:
    """Let a decoder use the fastest number of threads that a placement offers; return the
    placement with that number. The steps tried write to KV block 1, which is cleared
    afterwards."""
    steps = [tokens_after(0, rows, block_size, 1) for rows in (1, min(8, block_size))]
    engines: dict[int, NativeEngine] = {}

    def seconds(threads: int) -> float:
        if threads not in engines:
            bound = placement.bound if threads == placement.threads else ()
            engines[threads] = decoder.engine(threads, bound)
            decoder.use(engines[threads])
            decoder.execute(steps[-1])  # allocates its buffers
        decoder.use(engines[threads])
        began = time.perf_counter()
        for step in steps:
            decoder.execute(step)
        return time.perf_counter() - began

    engines[placement.threads] = decoder.engine_in_use
    chosen = placement.threads
    try:
        decoder.execute(steps[-1])
        chosen, least = faster(placement.threads, placement.others, seconds)
    except NativeUnavailable as reason:
        return replace(placement, why=f"{placement.why}; not compared: {reason}")
    finally:
        decoder.use(engines[chosen])
        for threads, engine in engines.items():
            if threads != chosen:
                engine.close()
        decoder.clear([1])
    told = ", ".join(f"{1e3 * each:.1f} ms with {n}" for n, each in least.items())
    why = f"{placement.why}; steps of 1 and of 8 tokens took {told} threads"
    bound = placement.bound if chosen == placement.threads else ()
    return replace(placement, threads=chosen, why=why, bound=bound, others=())
