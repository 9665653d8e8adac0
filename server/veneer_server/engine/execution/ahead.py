"""Executes plans with a backend that accepts a step before the last one's tokens are read."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from veneer_server.constraints.grammars import Grammars
from veneer_server.engine.execution.model_runner import (
    LogitRows,
    ModelRunner,
    SampledRow,
    to_arrays,
)
from veneer_server.engine.execution.sampler import TorchDraws, token_ranks
from veneer_server.step.adapter_table import AdapterTable
from veneer_server.step.ahead import AheadBackend, Sampled, Submitted
from veneer_server.step.choice import TokenChoice
from veneer_server.step.plan import PlannedSequence, SequenceResult, StepPlan
from veneer_server.wire.messages import SamplingParams

_IGNORED = TokenChoice(SamplingParams(temperature=0), 0)
"""The choice for rows of logits that need no token."""


@dataclass(frozen=True, slots=True)
class _Unread:
    """A step that is submitted, but not read yet."""

    plan: StepPlan
    places: list[LogitRows]
    submitted: Submitted
    handed: list[int]
    """Indices of the sequences whose tokens the host samples."""


class AheadModelRunner(ModelRunner):
    """A model runner that implements `AheadRunner`.

    Rows that need a bias, penalties or a mask are sampled by the host from their logits, once
    the step is read. So their sequences miss every other step while other sequences continue.

    It never clears KV blocks, see `AheadBackend`: by the time it reads that a sequence's logits
    were not finite, a later step may be submitted in which the blocks belong to another.
    """

    def __init__(
        self,
        backend: AheadBackend,
        tables: Mapping[str, AdapterTable],
        block_size: int,
        grammars: Grammars | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(backend, tables, block_size, grammars, TorchDraws(), window)
        self._ahead = backend
        self._unread: deque[_Unread] = deque()
        self._rows: dict[int, int] = {}
        """Each sequence's row of logits in the last submitted step, by id."""

    def execute(self, plan: StepPlan) -> tuple[SequenceResult, ...]:
        assert not self._unread, "a step is not read yet"
        self.submit(plan)
        return self.read()

    @torch.inference_mode()
    def submit(self, plan: StepPlan) -> None:
        """See `AheadRunner.submit`."""
        arrays, places = to_arrays(plan, self._tables, self._block_size, self._window)
        choices, tops = [_IGNORED] * len(arrays.logit_rows), [0] * len(arrays.logit_rows)
        carried, scored = [-1] * len(arrays.tokens), [-1] * len(arrays.logit_rows)
        handed: list[int] = []
        rows: dict[int, int] = {}
        for index, (planned, place) in enumerate(zip(plan.sequences, places, strict=True)):
            if planned.carries:
                carried[arrays.row_starts[index + 1] - 1] = self._rows[planned.sequence]
            for row, token in enumerate(planned.score, place.begin):
                scored[row], tops[row] = token, planned.top_logprobs
            if place.sample is None:
                continue
            if planned.unadjusted:
                choices[place.sample] = TokenChoice(planned.sampling, planned.position)
                tops[place.sample] = planned.top_logprobs if planned.logprobs else 0
                rows[planned.sequence] = place.sample
            else:
                handed.append(index)
        at = [s for index in handed if (s := places[index].sample) is not None]
        carried = carried if max(carried) >= 0 else []
        scored = scored if plan.scores else []
        submitted = self._ahead.submit(arrays, choices, tops, carried, at, scored)
        self._rows = rows
        self._unread.append(_Unread(plan, places, submitted, handed))

    @torch.inference_mode()
    def read(self) -> tuple[SequenceResult, ...]:
        """See `AheadRunner.read`."""
        step = self._unread.popleft()
        sampled = self._ahead.read(step.submitted)
        results = tuple(
            SequenceResult(finite=all(sampled.finite[place.begin : place.end]))
            for place in step.places
        )
        for planned, place, result in zip(
            step.plan.sequences, step.places, results, strict=True
        ):
            if not result.finite:
                continue
            if place.sample is not None and planned.unadjusted:
                _fill(result, planned, sampled, place.sample)
            if planned.score:
                self._score(result, planned, sampled, place.begin)
        self._sample_handed(step, sampled, results)
        return results

    def _score(
        self, result: SequenceResult, planned: PlannedSequence, sampled: Sampled, begin: int
    ) -> None:
        """Add the log-probabilities of a chunk of the prompt to the result."""
        end = begin + len(planned.score)
        result.scores = tuple(sampled.logprobs[begin:end])
        if planned.top_logprobs:
            result.score_tops = tuple(sampled.tops[begin:end])
        if planned.ranks:
            logits = self._ahead.last_logits[begin:end]
            following = torch.tensor(planned.score, device=logits.device)
            result.score_ranks = tuple(token_ranks(logits, following))

    def _sample_handed(
        self, step: _Unread, sampled: Sampled, results: tuple[SequenceResult, ...]
    ) -> None:
        rows = [
            SampledRow(step.plan.sequences[index], at, results[index], results[index])
            for at, index in enumerate(step.handed)
            if results[index].finite
        ]
        if rows:
            self._sample(sampled.handed, rows)


def _fill(result: SequenceResult, planned: PlannedSequence, sampled: Sampled, at: int) -> None:
    """Copy the token that the device sampled, and its log-probabilities, into the result."""
    result.token = sampled.tokens[at]
    result.finite = result.token is not None
    if planned.logprobs and result.finite:
        result.logprob = sampled.logprobs[at]
        if planned.top_logprobs:
            result.tops = sampled.tops[at]
