"""Exact mode: a sequence's numbers do not depend on the other sequences in the step.

GEMMs, reductions and fused attention choose their order of summation by shape, so a
row's last bits change with the batch. Here every sequence gets its own backend call and
sampler call, whose shapes depend only on its position. With the scheduler's canonical
chunks (`SchedulerLimits.exact`), tokens and log-probabilities are bit-identical whatever
else is in the batch, preempted or not, on the same machine with the same number of threads.

Only used if the backend needs it (`Chosen.invariant`): the native backend's rows
are bit-identical anyway.

The price: weights are read once per sequence, so a step of n sequences takes about as
long as n steps; there is no prefix cache; and a preempted sequence recomputes its generated
tokens one per step.
"""

from __future__ import annotations

from veneer_server.step.plan import Runner, SequenceResult, StepPlan


class ExactRunner:
    """A `Runner` that executes each sequence of a plan alone, with another runner."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        alone = (self._runner.execute(StepPlan((one,))) for one in plan.sequences)
        return tuple(result for results in alone for result in results)
