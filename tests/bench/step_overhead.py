"""Measure Python's share of a step (planning, arrays for the backend, results):
``python -m tests.bench.step_overhead``.

The scheduler, the residency and the runner's arrays are the real ones; the backend is left out.
Prints medians of one step's CPU time, in ms, for

- 64 sequences of 16,384 tokens that decode
- 10,000 sequences that wait while 64 run: for the base; for 50 adapters; each for its own
  adapter; and for 50 adapters, from 256 tenants
"""

from __future__ import annotations

import time
from statistics import median

from veneer_server.engine.execution.model_runner import to_arrays
from veneer_server.engine.residency.residency import Residency
from veneer_server.engine.scheduling.block_manager import BlockManager
from veneer_server.engine.scheduling.scheduler import Scheduler
from veneer_server.engine.scheduling.sequence import Sequence
from veneer_server.engine.scheduling.step_limits import SchedulerLimits
from veneer_server.step.plan import SequenceResult
from veneer_server.wire.messages import AdapterSource, SamplingParams, SequenceRequest

BLOCK, RUNNING, LONG, WAITING = 16, 64, 16_384, 10_000
STEPS = 64
ADAPTER_BYTES = 10 << 20


def make_sequence(
    number: int, tokens: int, adapter: AdapterSource | None, tenant: str = ""
) -> Sequence:
    request = SequenceRequest(
        prompt=[7] * tokens,
        sampling=SamplingParams(),
        max_tokens=1 << 16,
        adapter=adapter,
        ignore_eos=True,
        use_prefix_cache=False,
        tenant=tenant,
    )
    return Sequence(number, request, 0.0, None)


def time_steps(title: str, tokens: int, waiting: int, adapters: int, tenants: int = 1) -> None:
    blocks = BlockManager(RUNNING * (tokens // BLOCK + 16), BLOCK)
    residency = Residency(RUNNING * ADAPTER_BYTES, RUNNING * ADAPTER_BYTES, 1, shared=True)
    limits = SchedulerLimits(
        max_running=RUNNING,
        max_batch_tokens=RUNNING * tokens,
        context_length=1 << 20,
        prefill_beside_decode=RUNNING * tokens,
    )
    scheduler = Scheduler(limits, blocks, residency, frozenset())
    for number in range(RUNNING):
        scheduler.add(make_sequence(number, tokens, None, f"{number % tenants}"))
    plan = scheduler.schedule(0.0)
    assert plan is not None
    scheduler.update(plan, tuple(SequenceResult(token=1) for _ in plan.sequences))
    for number in range(waiting):
        adapter = None
        if adapters:
            digest = f"{number % adapters:064d}"
            adapter = AdapterSource(digest, "", ADAPTER_BYTES, digest)
            residency.lease(adapter)
        tenant = f"{number % tenants}"
        scheduler.add(make_sequence(RUNNING + number, 40, adapter, tenant))
    spent = []
    for step in range(STEPS):
        began = time.thread_time()
        scheduler.plan_adapters(float(step))
        plan = scheduler.schedule(float(step))
        assert plan is not None
        assert len(plan.sequences) == RUNNING
        to_arrays(plan, {}, BLOCK)
        results = tuple(SequenceResult(token=1) for _ in plan.sequences)
        scheduler.update(plan, results)
        _ = scheduler.waiting_for_adapter, scheduler.waiting_adapters
        spent.append(1e3 * (time.thread_time() - began))
    print(f"{title:50} {median(spent):6.2f} ms, at most {max(spent):6.2f}", flush=True)


def main() -> None:
    """Measure and print."""
    time_steps("64 sequences of 40 tokens", 40, 0, 0)
    time_steps("64 sequences of 16,384 tokens", LONG, 0, 0)
    time_steps("10,000 waiting for the base", 40, WAITING, 0)
    time_steps("10,000 waiting for 50 adapters", 40, WAITING, 50)
    time_steps("10,000 waiting, each for another adapter", 40, WAITING, WAITING)
    time_steps("10,000 waiting for 50 adapters, of 256 tenants", 40, WAITING, 50, 256)


if __name__ == "__main__":
    main()
